"""A profile on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowgrove.profiler.command import Profile
from flowgrove.profiler.gaps import SHORT
from flowgrove.profiler.memory import KINDS, size_of
from flowgrove.profiler.table import Row
from flowgrove.profiler.terminal_table import draw_phases

_NAME = 60  # letters of a kernel's name
_LONGEST_NAMED = 5  # phases with the most idle time
_WIDE = ("phase", "s", "%", "passes", "rows", "tokens", "TFLOP/s", "% peak", "GB/s", "% copy", "launches", "waits")
_NARROW = ("phase", "s", "%", "passes", "rows", "reaches", "launches", "waits")
_WIDTH = 110  # of a terminal, from which the wide table fits


def draw_profile(found: Profile, console: Console) -> None:
    """The table of phases, what the device did not do, memory, advice, and which files hold the rest."""
    console.print(
        f"{escape(found.recipe)} on {found.machine['device']}: {found.seconds:.3g} s an iteration, mean of "
        f"{found.iterations} without the profiler, after {found.warm_up} to warm up", style="bold", soft_wrap=True,
    )  # fmt: skip
    console.print(_phases(found.rows, console.width))
    total = sum(row["seconds"] for row in found.rows if not row["beside"])
    console.print(f"sum of the phases {total:.3g} s, {total / found.seconds:.1%} of the iteration", soft_wrap=True)
    for line in _notes(found):
        console.print(line, soft_wrap=True, markup=False)
    console.print()
    if not found.suggestions:
        console.print("nothing stands out that another key would mend", soft_wrap=True)
    for number, suggestion in enumerate(found.suggestions, 1):
        console.print(f"{number}. {escape(suggestion.told(found.seconds))}", soft_wrap=True)


def _phases(rows: list[Row], width: int) -> Table:
    """With all columns that hold anything, or in a narrow terminal with rates in one column and no tokens."""
    return draw_phases(rows, [_cells(row) for row in rows], _WIDE if width >= _WIDTH else _NARROW)


def _cells(row: Row) -> dict[str, str]:
    reaches = ""
    if row["utilisation"] is not None:
        reaches = f"{_rate(row['tflop_per_s'])} {100 * row['utilisation']:3.0f} %"
    elif row["share_of_copy"] is not None:
        reaches = f"{row['gb_per_s']:.2g} GB/s {100 * row['share_of_copy']:3.0f} %"
    return {
        "phase": ("| " if row["beside"] else "") + row["phase"],
        "reaches": reaches,
        "s": _seconds(row["seconds"]),
        "%": "" if row["beside"] else f"{100 * row['share']:.1f}",
        "passes": _number(row["passes"]),
        "rows": _number(row["rows"]),
        "tokens": _number(row["tokens"]),
        "TFLOP/s": "" if row["tflop_per_s"] is None else f"{row['tflop_per_s']:.3g}",
        "% peak": "" if row["utilisation"] is None else f"{100 * row['utilisation']:.0f}",
        "GB/s": "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.3g}",
        "% copy": "" if row["share_of_copy"] is None else f"{100 * row['share_of_copy']:.0f}",
        "launches": _number(row["launches"]),
        "waits": _number(row["waits"]),
    }


def _rate(tera: float) -> str:
    return f"{tera:.3g} TFLOP/s" if tera >= 1 else f"{1e3 * tera:.3g} GFLOP/s"


def _seconds(value: float) -> str:
    """Five letters for most."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _notes(found: Profile) -> list[str]:
    lines = []
    if found.matrix_rate and found.copy_rate:
        lines.append(
            f"measured here: {_rate(found.matrix_rate / 1e12)} in a {found.dtype} matrix product (100 % peak), "
            f"{found.copy_rate / 1e9:.3g} GB/s in a copy (100 % copy)"
        )
    what = "kernels, copies and fills" if found.on_gpu else "ops"
    waits = "are the host's for the GPU" if found.on_gpu else "are reads of one element, most of which wait on a GPU"
    if any(row["beside"] for row in found.rows):
        lines.append("| phases run on a second thread beside the others, and are not in the sum")
    lines.append(f"launches are {what}; waits {waits}; both of the profiled iterations")
    if found.idle is None:
        lines.append("idle gaps between kernels: not measured, needs a GPU")
    else:
        idle = found.idle
        lines.append(f"GPU busy {idle.busy / max(idle.span, 1e-9):.1%} of {idle.span / 1e6:.3g} s, under the profiler")
        worst = sorted(idle.gaps.items(), key=lambda each: -each[1].total)[:_LONGEST_NAMED]
        lines += [
            f"  idle {gaps.total / 1e3:.3g} ms before work of {phase}: {gaps.count:,} gaps, {gaps.long:,} of more than "
            f"{SHORT:g} µs, the longest {gaps.longest / 1e3:.3g} ms" for phase, gaps in worst
        ]  # fmt: skip
    lines.append(f"most time of {'the GPU' if found.on_gpu else 'all'}: " + ", ".join(
        f"{name[:_NAME]} {_seconds(seconds)} s" for name, seconds in found.heaviest.items()
    ))  # fmt: skip
    memory = found.memory
    parts = ", ".join(f"{kind} {size_of(memory.at_peak[kind])}" for kind in KINDS if memory.at_peak[kind])
    told = "" if found.allocator_peak is None else f" (the allocator says {size_of(found.allocator_peak)})"
    lines.append(f"memory at its fullest {size_of(memory.peak)}{told}: {parts}")
    return [*lines, f"trace, memory timeline and tables: {found.out}"]
