"""From ranges to phases: rollout/transformer is what all ranges iteration 3/rollout/step 7/transformer take together.

The seconds of a phase are exclusive. What a stage takes outside the ranges in it is its own phase STAGE/other, and what
an iteration takes outside its stages BETWEEN, so that the phases of the iteration's own thread add up to its seconds.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from flowgrove.profiler.clock import Spent
from flowgrove.spans import WAIT

BETWEEN = "between stages"
OTHER = "other"
_NUMBERED = re.compile(r"(iteration|step|update|pass) \d+")


@dataclass
class Phase:
    """What the ranges of a phase take in an iteration. `beside`: on a thread beside the iteration's own, whose seconds
    are not in the iteration's.
    """

    name: str
    beside: bool
    kind: str
    seconds: float = 0.0
    passes: float = 0
    rows: float = 0
    tokens: float = 0

    @property
    def stage(self) -> str:
        """The stage that it belongs to."""
        return self.name.partition("/")[0]

    @property
    def waits(self) -> bool:
        """Whether the iteration waits in it for the thread that decodes and scores beside it."""
        return waits(self.name)


def waits(name: str) -> bool:
    """Whether that is the phase of a wait for the thread that decodes and scores."""
    return name.endswith(f"/{WAIT}")


class Names:
    """The phase of every path among `paths`."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._parents = {path[:place] for path in paths for place, letter in enumerate(path) if letter == "/"}

    def of(self, path: str | None) -> str:
        """The phase of work that lies in the range `path` and in none inside it; None: outside all."""
        parts = (path or "").split("/")
        if path is None or (len(parts) == 1 and parts[0].startswith("iteration")):
            return BETWEEN
        stage, *inner = parts[1:] if parts[0].startswith("iteration") else parts
        named = [part for part in inner if not _NUMBERED.fullmatch(part)]
        if named and path not in self._parents:
            return "/".join([stage, *named])
        top = path[: len(path) - len("/".join(inner)) - 1] if inner else path
        return f"{stage}/{OTHER}" if inner or top in self._parents else stage


def phases_of(spent: list[Spent], iterations: int = 1) -> list[Phase]:
    """The phases of an iteration, means over so many, in the order in which they first come; those beside it last."""
    names = Names(one.path for one in spent)
    found: dict[tuple[str, bool], Phase] = {}
    for one, seconds in zip(spent, _exclusive(spent), strict=True):
        name = names.of(one.path)
        if one.beside and name.endswith(OTHER):  # that thread waits for work, or its ranges lie in another stream
            continue
        phase = found.setdefault((name, one.beside), Phase(name, one.beside, one.kind))
        phase.seconds += seconds / iterations
        if not name.endswith(OTHER) and name != BETWEEN:
            phase.passes += one.passes / iterations
            phase.rows += one.rows / iterations
            phase.tokens += one.tokens / iterations
    order = [*dict.fromkeys(phase.stage for phase in found.values() if phase.name != BETWEEN), BETWEEN]
    return sorted(
        found.values(), key=lambda phase: (phase.beside, order.index(phase.stage), phase.name.endswith(OTHER))
    )


def _exclusive(spent: list[Spent]) -> list[float]:
    """Seconds of each without those of the ranges right inside it, on the same thread."""
    place = {(one.path, one.beside): number for number, one in enumerate(spent)}
    seconds = [one.seconds for one in spent]
    for one in spent:
        parent = one.path
        while parent:
            parent = parent.rpartition("/")[0]
            if (outer := place.get((parent, one.beside))) is not None:
                seconds[outer] -= one.seconds
                break
    return seconds
