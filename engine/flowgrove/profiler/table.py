"""The table of phases: seconds, passes and rows of each, and how near it comes to what the device can do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flowgrove.profiler.clock import Spent
from flowgrove.profiler.phases import Names, Phase, phases_of
from flowgrove.spans import OPS

COLUMNS = (
    "phase", "beside", "kind", "seconds", "share", "passes", "rows", "tokens", "tflop", "tflop_per_s", "utilisation",
    "gb", "gb_per_s", "share_of_copy", "launches", "waits",
)  # fmt: skip
Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What was measured of some iterations. `spent`: ranges of undisturbed ones; `seconds`: of one of those, by the
    host's clock; `flops` by path and thread of those ranges, `bytes_of` by path what the fused ops moved in
    them; `launches` and `waits` by phase of the profiled ones; `iterations`: how many of each.
    """

    spent: list[Spent]
    seconds: float
    iterations: int
    flops: Mapping[tuple[str, bool], float]
    bytes_of: Mapping[str, int]
    launches: Mapping[str, int]
    waits: Mapping[str, int]

    def phases(self) -> list[Phase]:
        """Of an iteration."""
        return phases_of(self.spent, self.iterations)


def phase_table(measured: Measured, matrix_rate: float | None, copy_rate: float | None) -> list[Row]:
    """A row per phase of an iteration, as COLUMNS names them; None where a phase has no such figure. Shares are of the
    iteration's seconds. `matrix_rate` in FLOP/s, `copy_rate` in bytes per second.

    Launches and waits of a phase that runs on two threads stand in its first row.
    """
    names = Names(one.path for one in measured.spent)
    flops = _by_phase({key: value / measured.iterations for key, value in measured.flops.items()}, names)
    moved = _by_phase({(path, False): size / measured.iterations for path, size in measured.bytes_of.items()}, names)
    rows: list[Row] = []
    seen: set[str] = set()
    for phase in measured.phases():
        key, seconds = (phase.name, phase.beside), phase.seconds
        first = phase.name not in seen
        seen.add(phase.name)
        work = flops.get(key)
        gigabytes = moved[key] / 1e9 if phase.kind == OPS and key in moved else None
        rate, speed = _over(work, seconds), _over(gigabytes, seconds)
        rows.append({
            "phase": phase.name, "beside": phase.beside, "kind": phase.kind,
            "seconds": seconds, "share": seconds / measured.seconds,
            "passes": _count(phase.passes), "rows": _count(phase.rows), "tokens": _count(phase.tokens),
            "tflop": _over(work, 1e12), "tflop_per_s": _over(rate, 1e12), "utilisation": _over(rate, matrix_rate),
            "gb": gigabytes, "gb_per_s": speed, "share_of_copy": _over(speed, copy_rate and copy_rate / 1e9),
            "launches": _count(measured.launches.get(phase.name, 0) / measured.iterations) if first else None,
            "waits": _count(measured.waits.get(phase.name, 0) / measured.iterations) if first else None,
        })  # fmt: skip
    return rows


def utilisation(rows: list[Row], matrix_rate: float | None) -> float | None:
    """Of the matrix rate by all phases of the transformer together; None where that is not known."""
    some = [row for row in rows if row["kind"] == "transformer" and row["tflop"] is not None]
    seconds = sum(row["seconds"] for row in some)
    return (
        _over(_over(sum(row["tflop"] for row in some), seconds), matrix_rate and matrix_rate / 1e12) if some else None
    )


def _by_phase(values: Mapping[tuple[str, bool], float], names: Names) -> dict[tuple[str, bool], float]:
    found: dict[tuple[str, bool], float] = {}
    for (path, beside), value in values.items():
        key = names.of(path), beside
        found[key] = found.get(key, 0.0) + value
    return found


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _count(value: float) -> int | float:
    """Whole where it is."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
