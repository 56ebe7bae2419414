"""How large a pass of the transformer may be; when the device's memory disagrees, see out_of_memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flowgrove.passes.packing import Ints, pack

_log = logging.getLogger("flowgrove")


class PassBudget:
    """`tokens` that a pass may hold, picture and text, padding included; `row`: those of one row of the longest prompt;
    `pixels` that are decoded together. Rollout, training and evaluation share it. `lasting`: for how long passes stay
    small once they are halved, as the warning says it.
    """

    def __init__(self, tokens: int, row: int, pixels: int, lasting: str = "from here on") -> None:
        self.tokens, self.row, self.pixels, self._lasting = tokens, row, pixels, lasting
        self._largest = 0  # pass of several rows since it was last halved

    @property
    def rows(self) -> int:
        """Rows of the longest prompt that a pass may hold, without guidance."""
        return max(1, self.tokens // self.row)

    def passes(self, tokens: Ints) -> list[Ints]:
        """Which of the rows of `tokens` each go through the transformer together."""
        passes = pack(tokens, self.tokens)
        self._largest = max([self._largest, *(len(rows) * int(tokens[rows[0]]) for rows in passes if len(rows) > 1)])
        return passes

    def apart(self, lasting: str) -> "PassBudget":
        """One of this size whose passes and halvings are its own."""
        return PassBudget(self.tokens, self.row, self.pixels, lasting)

    def resize(self, tokens: int) -> None:
        """From here on passes hold `tokens`."""
        self.tokens = tokens

    def samples(self, pixels: int) -> int:
        """Samples of `pixels` each that are decoded together."""
        return max(1, self.pixels // pixels)

    def halve_samples(self, pixels: int) -> bool:
        """From here on half as much is decoded together; False if it was one sample of `pixels`."""
        if self.samples(pixels) == 1:
            return False
        self.pixels //= 2
        return True

    @contextmanager
    def samples_kept(self) -> Iterator[None]:
        """After the block as much is decoded together as before it."""
        pixels = self.pixels
        try:
            yield
        finally:
            self.pixels = pixels

    def halve(self) -> bool:
        """From here on passes hold half as much as the largest so far; False if none had more than one row."""
        return self.halve_from(self._largest)

    def halve_from(self, tokens: int) -> bool:
        """From here on passes hold half as much as one of `tokens` that did not fit; False for 0."""
        if not tokens:
            return False
        self.tokens, self._largest = tokens // 2, 0
        told = "the GPU's memory is full: passes hold %d tokens %s (engine.token_budget)"
        _log.warning(told, self.tokens, self._lasting)
        return True
