"""What became of prompts that could not be scored: their groups are left out, and why is told, never a 0.

A reward that fails is asked again for each prompt alone, so that one at fault costs no other, and, if it does not ask
again by itself, once more after a while. Where one prompt after another fails, all that are left have failed: a reward
that is broken is not asked for minutes.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError, one_line

Ask = Callable[[slice], Tensor]
_log = logging.getLogger("flowgrove")
_WAIT = 1.0  # seconds before a reward is asked once more
_IN_A_ROW = 3  # prompts that fail one after another before the rest is given up
_SLOW = 60.0  # seconds after which a reward that is still at work is named


class RewardError(UserError):
    """A reward gave no score for what it was asked: its group is left out. Any other UserError is about the recipe.

    `asked_again`: the reward has done so by itself, `unreachable`: in vain, and would for every other prompt.
    """

    def __init__(self, text: str, asked_again: bool = False, unreachable: bool = False) -> None:
        super().__init__(text)
        self.asked_again, self.unreachable = asked_again, unreachable


class Faults:
    """What went wrong in one iteration or evaluation on this rank. `errors`: by what they say, in the order in which
    they came; `given_up`: the rewards that gave no score for any of the prompts that they were asked for together, and
    are not asked for the rest.
    """

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.given_up: set[str] = set()

    def note(self, error: Exception, reward: str = "") -> None:
        """Keeps it, once; an error that is no line for the user is of this `reward`."""
        named = isinstance(error, UserError)
        said = str(error) if named else f"reward {reward}: {type(error).__name__}: {one_line(str(error), 300)}"
        self.errors.setdefault(said, error)

    def tell(self, what: str, left_out: int) -> None:
        """One warning line, if there is anything to tell: for what `left_out` prompts are left out."""
        if not self.errors or not left_out:
            return
        first, *others = self.errors
        more = f" (and {len(others)} more reason{'s' if len(others) > 1 else ''})" if others else ""
        _log.warning("%s leaves out %d prompt%s: %s%s", what, left_out, "s" if left_out > 1 else "", first, more)

    def raise_first(self) -> None:
        """Raises the first error, if there is one."""
        for error in self.errors.values():
            raise error


def groups_of(samples: Sequence[str] | Sequence[int]) -> list[slice]:
    """Where the groups of equal neighbours lie: of prompts, or of their numbers, which tell equal prompts apart."""
    starts = [n for n in range(len(samples)) if n == 0 or samples[n] != samples[n - 1]]
    return [slice(start, end) for start, end in pairwise([*starts, len(samples)])]


def numbered(prompts: list[str], each: int | None = None) -> list[int]:
    """The number of every sample's group: of `each` samples in a row, or of all neighbours of one prompt."""
    if each is not None:
        return [row // each for row in range(len(prompts))]
    return [number for number, group in enumerate(groups_of(prompts)) for _ in range(group.start, group.stop)]


def told_apart(prompts: list[str], groups: list[slice]) -> list[slice]:
    """All samples of `groups`, in parts where prompts alone tell groups apart: no neighbours are of equal ones."""
    parts: list[slice] = []
    for group in groups:
        if parts and prompts[group.start] != prompts[group.start - 1]:
            parts[-1] = slice(parts[-1].start, group.stop)
        else:
            parts.append(group)
    return parts


def ask_for_each(reward: str, ask: Ask, groups: list[slice], error: Exception, faults: Faults) -> Tensor:
    """Scores float64 of all groups' samples, after a reward has raised `error` for all of them together: NaN for those
    that cannot be scored. `ask` gives the scores of a slice.
    """
    scores = torch.full((groups[-1].stop,), torch.nan, dtype=torch.float64)
    left, failed, in_a_row = list(groups), fault_of(error), 0
    rounds = 1 if isinstance(failed, RewardError) and failed.asked_again else 2
    for number in range(rounds):
        if number:
            time.sleep(_WAIT)
        trying, left, in_a_row = left, [], 0
        for at, group in enumerate(trying):
            try:
                scores[group] = ask(group)
                in_a_row = 0
            except Exception as again:
                failed = fault_of(again)
                left.append(group)
                in_a_row += _IN_A_ROW if isinstance(failed, RewardError) and failed.unreachable else 1
            if in_a_row >= _IN_A_ROW:
                left += trying[at + 1 :]
                break
        if not left:
            return scores
    faults.note(failed, reward)
    if in_a_row >= _IN_A_ROW and bool(scores.isnan().all()):
        faults.given_up.add(reward)
    return scores


def fault_of(error: Exception) -> Exception:
    """The error, if it may be the fault of what was scored. Raises it if it is not: too little memory, a mistake in the
    recipe, a GPU that has failed; and the interruption that a reward has turned into an error of its own.
    """
    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and not any(cause is one for one in seen):  # they may lead in a circle
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    recipes = isinstance(error, UserError) and not isinstance(error, RewardError)
    if recipes or is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        raise error
    return error


@contextmanager
def named_if_slow(reward: str) -> Iterator[None]:
    """Tells, once, that the run waits for a reward. Slowness is no fault: it goes on as long as it takes."""
    told = ("reward %s has been at work for %.0f s: the run waits for it", reward, _SLOW)
    timer = threading.Timer(_SLOW, _log.warning, told)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
