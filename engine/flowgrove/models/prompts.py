"""Encoded prompts, as passes take them."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowgrove.models.conditioning import Conditioning
from flowgrove.passes.packing import Ints


@dataclass(frozen=True)
class Prompts:
    """Texts, their conditioning [P], and where guidance needs it the distinct unconditional ones [U]
    and which of them each prompt has, int64 [P] on the device; on the host [P], `lengths` of the texts in tokens (the
    longer of both), and `tokens` that a row of each costs, pictures and text, both rows of guidance. Where passes are
    split by lengths, on the host `masked_lengths` [P, masks]: a row's tokens in each sequence that a mask marks, and
    behind them those of its unconditional row.
    """

    texts: list[str]
    cond: Conditioning
    uncond: Conditioning | None
    uncond_of: Tensor | None
    lengths: Ints
    tokens: Ints
    masked_lengths: Ints | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def unguided(self) -> "Prompts":
        """The same for passes without guidance."""
        if self.uncond is None:
            return self
        tokens, masked = self.tokens // 2, self.masked_lengths
        if masked is not None:
            own, away = np.split(masked, 2, axis=1)
            tokens, masked = (self.tokens + own.sum(1) - away.sum(1)) // 2, own
        return Prompts(self.texts, self.cond, None, None, self.lengths, tokens, masked)

    def uncond_rows(self, prompt_of: Tensor) -> Conditioning | None:
        """The unconditional conditioning of rows of these prompts."""
        if self.uncond is None or self.uncond_of is None:
            return None
        return self.uncond[self.uncond_of[prompt_of]]

    def longest(self, prompts: Ints) -> int:
        """Tokens of the longest text of these prompts."""
        return int(self.lengths[prompts].max())

    def tokens_of(self, prompts: Ints) -> int:
        """Tokens that a row of each of these prompts costs together."""
        return int(self.tokens[prompts].sum())

    def __getitem__(self, some: slice) -> "Prompts":
        uncond_of = None if self.uncond_of is None else self.uncond_of[some]
        lengths, tokens = self.lengths[some], self.tokens[some]
        masked = None if self.masked_lengths is None else self.masked_lengths[some]
        return Prompts(self.texts[some], self.cond[some], self.uncond, uncond_of, lengths, tokens, masked)
