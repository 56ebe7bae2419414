"""What a run will take, as a person reads it, and as JSON."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:  # predicting needs torch, drawing does not
    from flowgrove.cost.run_time import RunTime

_DRAWN = 6  # groups of iterations
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
_LEFT = "not predicted"


def time_json(found: "RunTime") -> dict[str, Any]:
    """What `flowgrove plan --time --json` adds: seconds and FLOPs; null for what is not predicted."""
    return {
        "time": {
            "device": found.device,
            "ranks": found.ranks,
            "rows": found.rows,
            "matrix_rate": found.matrix_rate,
            "rests_on": found.rests_on,
            "not_predicted": found.not_predicted,
            "cheap": None if found.cheap is None else asdict(found.cheap),
            "flops": [
                {**{key: value for key, value in asdict(size).items() if key != "geometry"}, "train": size.train}
                | {"height": size.geometry.height, "width": size.geometry.width, "frames": size.geometry.frames}
                for size in found.flops
            ],
            "iteration": {**found.iteration.seconds, "total": found.iteration.total},
            "iteration_flops": found.iteration.flops,
            "iterations": [
                {
                    "first": some.first,
                    "count": some.count,
                    "window": list(some.window),
                    "seconds": {**some.spent.seconds, "total": some.spent.total},
                }
                for some in found.iterations
            ],
            "evaluations": found.evaluations,
            "evaluation": None
            if found.evaluation is None
            else {**found.evaluation.seconds, "total": found.evaluation.total},
            "encoding": found.encoding,
            "texts": found.texts,
            "run": found.seconds,
        }
    }


def draw_time(found: "RunTime", console: Console) -> None:
    """Seconds of an average iteration by stage, of an evaluation, and of the run, with what they rest on."""
    of_ranks = f" of {found.ranks}, that with the most prompts" if found.ranks > 1 else ""
    states = f"{found.rows} state{'s' if found.rows > 1 else ''} a pass"
    console.print(f"\npredicted time on one {found.device}{of_ranks} ({states})")
    console.print(f"  [dim]{'an average iteration':<26}{'time':>12}{'TFLOP':>12}{'utilisation':>14}[/]")
    mean = found.iteration
    for stage, seconds in mean.seconds.items():
        flops, used = mean.flops.get(stage), found.utilisation(stage)
        done = f"{flops / 1e12:,.4g}" if flops else ""
        console.print(
            f"  {stage:<26}{_told(seconds):>12}{done:>12}{'' if used is None else f'{used:.0%}':>14}".rstrip()
        )
    console.print(f"  [bold]{'together':<26}{_told(mean.total):>12}[/]")
    if len(found.iterations) > 1:
        for some in found.iterations[:_DRAWN]:
            window = f"{some.window[0]}…{some.window[-1]}" if some.window else "none"
            name = f"{some.count} with window {window}"
            console.print(f"  [dim]{name:<26}{_told(some.spent.total):>12}[/]")
        if (more := len(found.iterations) - _DRAWN) > 0:
            console.print(f"  [dim]and {more} more kinds[/]")
    if found.evaluation is not None and found.evaluations:
        console.print(f"  {f'{found.evaluations} evaluations, each':<26}{_told(found.evaluation.total):>12}")
    console.print(f"  {f'encoding {found.texts:,} texts':<26}{_told(found.encoding):>12}")
    count = sum(some.count for some in found.iterations)
    console.print(f"  [bold]{f'run of {count:,} iterations':<26}{_told(found.seconds):>12}[/]")
    if found.cheap is not None and found.cheap.share is not None:
        console.print(f"  {found.cheap.name}: {found.cheap.share:.2f} of the time of a full one, where nothing trains")
    for what, origin in found.rests_on.items():
        console.print(f"  [dim]{what}: {origin}[/]")
    console.print(f"  [dim]not predicted: {', '.join(found.not_predicted)}[/]")
    sizes = {size.geometry: size for size in found.flops}
    for geometry, size in sizes.items():
        row = ", both rows of guidance" if size.doubled > 1 else ""
        recomputed = f", {size.trained * size.recomputed / 1e12:.3g} again by checkpointing" if size.recomputed else ""
        console.print(
            f"  [dim]TFLOP of a state at {geometry.height}×{geometry.width}{row}: "
            f"forward {size.doubled * size.forward / 1e12:.3g}, backward {size.trained * size.backward / 1e12:.3g}"
            f"{recomputed}; decoding {size.decode / 1e12:.3g}[/]"
        )


def _told(seconds: float | None) -> str:
    """In the largest unit of which there is one."""
    if seconds is None:
        return _LEFT
    size, unit = next((one for one in _UNITS if seconds >= one[0]), _UNITS[-1])
    return f"{seconds / size:.3g} {unit}"
