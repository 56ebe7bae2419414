"""The values of a key of the recipe, measured in turn, and the choice among them."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError
from flowgrove.tuning.pass_times import Timed, Work, first_near_best
from flowgrove.tuning.token_budget import no_room

_ROUNDS = 3
_NO_ROOM = "does not fit into the memory"

Value = int | str | bool | None


class Candidate(NamedTuple):
    """A value of a key, as a comment names it, and its measurement."""

    value: Value
    label: str
    measure: Callable[[], Timed]


class Choice(NamedTuple):
    """The value of a key, and the measurements behind it, a line each."""

    key: str
    value: Value
    lines: list[str]
    section: str = "engine"


def choose(
    key: str, candidates: list[Candidate], work: Work, notes: tuple[str, ...] = (), section: str = "engine"
) -> Choice:
    """The first candidate within NEAR of the least predicted seconds. Raises UserError if none runs."""
    times: dict[str, list[Timed]] = {candidate.label: [] for candidate in candidates}
    failed: dict[str, str] = {}
    for turn in range(_ROUNDS + 1):  # the first warms up
        for _, label, measure in candidates:
            if label in failed:
                continue
            try:
                timed = measure()
            except (RuntimeError, UserError) as error:  # UserError: a pass that cannot be recorded
                failed[label] = _NO_ROOM if is_out_of_memory(error) else reason(error)
            else:
                times[label] += [timed] if turn else []
    medians = {
        label: Timed(*map(statistics.median, zip(*rounds, strict=True)))
        for label, rounds in times.items()
        if label not in failed
    }
    if not medians:
        why = next(iter(failed.values()))
        raise (
            no_room()
            if why == _NO_ROOM
            else UserError(f"{section}.{key}: nothing that was tried runs here ({why}): set another engine.device")
        )
    seconds = {label: work.seconds(row) for label, row in medians.items()}
    chosen = first_near_best(seconds)
    told = {
        label: f"{1e3 * row.forward:.3g} + {1e3 * row.train:.3g} ms, {seconds[label]:.3g} s"
        for label, row in medians.items()
    }
    told[chosen] += ", chosen"
    lines = [f"{label}: {failed.get(label) or told[label]}" for label in times]
    value = next(candidate.value for candidate in candidates if candidate.label == chosen)
    return Choice(key, value, [*lines, *notes], section)


def reason(error: Exception) -> str:
    """Why a candidate is left out, in a line."""
    return f"fails: {next(iter(str(error).splitlines()), '') or type(error).__name__}"
