"""A capture of Nsight Systems on the terminal."""

from collections.abc import Callable

from rich.console import Console

from flowgrove.profiler.gaps import SHORT
from flowgrove.profiler.nsys import Capture, Row
from flowgrove.profiler.terminal_table import draw_phases

_MOST_GAPS, _MOST_KERNELS, _NAME = 5, 6, 60
_HEADINGS: dict[str, Callable[[Row], str]] = {
    "phase": lambda row: ("| " if row["beside"] else "") + row["phase"],
    "host ms": lambda row: f"{1e3 * row['seconds']:,.2f}",
    "%": lambda row: "" if row["beside"] else f"{100 * row['share']:.1f}",
    "GPU ms": lambda row: f"{1e3 * row['gpu_seconds']:,.2f}" if row["gpu_seconds"] else "",
    "GPU %": lambda row: f"{100 * row['gpu_share']:.1f}" if row["gpu_share"] else "",
    "idle ms": lambda row: f"{1e3 * row['idle_seconds']:,.2f}" if row["idle_seconds"] else "",
    "passes": lambda row: _number(row["passes"]),
    "rows": lambda row: _number(row["rows"]),
    "tokens": lambda row: _number(row["tokens"]),
    "launches": lambda row: _number(row["launches"]),
    "waits": lambda row: _number(row["waits"]),
}


def draw_capture(capture: Capture, console: Console) -> None:
    """The table of phases, and below it how busy the GPU was, its longest gaps and its largest kernels."""
    rows, idle = capture.table(), capture.idle
    seconds = sum(row["seconds"] for row in rows if not row["beside"])
    title = f"process {capture.number}: {seconds:.3g} s an iteration, mean of {capture.iterations}, under the profiler"
    console.print(title, style="bold", soft_wrap=True)
    console.print(
        draw_phases(rows, [{heading: shown(row) for heading, shown in _HEADINGS.items()} for row in rows], _HEADINGS)
    )
    if any(row["beside"] for row in rows):
        console.print("| phases run on a second thread beside the others", soft_wrap=True)
    if capture.trace.on_gpu:
        console.print(f"GPU busy {idle.busy / max(idle.span, 1e-9):.1%} of {idle.span / 1e6:.3g} s", soft_wrap=True)
        worst = sorted(idle.gaps.items(), key=lambda each: -each[1].total)[:_MOST_GAPS]
        for phase, gaps in worst:
            console.print(
                f"  idle {gaps.total / 1e3:.3g} ms before work of {phase}: {gaps.count:,} gaps, {gaps.long:,} of more "
                f"than {SHORT:g} µs, the longest {gaps.longest / 1e3:.3g} ms", soft_wrap=True, markup=False,
            )  # fmt: skip
        largest = capture.trace.heaviest().most_common(_MOST_KERNELS)
        console.print(
            "most time of the GPU: " + ", ".join(f"{name[:_NAME]} {spent / 1e3:.3g} ms" for name, spent in largest),
            soft_wrap=True, markup=False,
        )  # fmt: skip
    else:
        console.print("GPU: nothing was captured; trace with --trace=cuda,nvtx on a GPU", soft_wrap=True)
    if capture.outside:
        console.print(f"{capture.outside:,} launches lay in no range and are left out", soft_wrap=True)


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0") if value else ""
