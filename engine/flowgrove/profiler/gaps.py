"""The time in which a device had nothing to do."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from flowgrove.profiler.events import Busy

SHORT = 20.0  # microseconds: shorter gaps are what launching any kernel costs


@dataclass
class Gaps:
    """Of a phase: how many, how many of more than SHORT, and microseconds of all and of the longest."""

    count: int = 0
    long: int = 0
    total: float = 0.0
    longest: float = 0.0


@dataclass
class Idle:
    """From the start of the first work to the end of the last: microseconds of it all and of work, gaps by phase."""

    span: float = 0.0
    busy: float = 0.0
    gaps: dict[str, Gaps] = field(default_factory=dict)


def idle(work: Iterable[Busy]) -> Idle:
    """The gaps between stretches of work on any stream. A gap lies in the phase whose work ends it: that is what the
    device waited for.
    """
    found, reached, first = Idle(), None, 0.0
    for start, end, phase in sorted(work):
        if reached is None:
            first = reached = start
        if start > reached:
            gap, one = start - reached, found.gaps.setdefault(phase, Gaps())
            one.count, one.long, one.total = one.count + 1, one.long + (gap > SHORT), one.total + gap
            one.longest = max(one.longest, gap)
        found.busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    found.span = 0.0 if reached is None else reached - first
    return found
