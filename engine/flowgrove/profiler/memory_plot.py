"""The memory of an iteration as a picture: what each kind holds over time, stage by stage."""

from pathlib import Path

from matplotlib.ticker import FuncFormatter

from flowgrove.profiler.memory import KINDS, Timeline, size_of
from flowgrove.report.figures import literal, pyplot, save_figure

# Okabe and Ito's, which colour-blind readers tell apart, from what stays to what comes and goes
_COLOURS = ("#7f7f7f", "#cc79a7", "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d9d9d9")
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_NARROW = 0.05  # of the width: stages that take less go without a name


def plot_memory(line: Timeline, stages: list[tuple[str, float, float]], title: str, path: Path) -> None:
    """`stages`: name, begin and end of each in seconds of the timeline."""
    size, unit = next((each for each in _UNITS if line.peak >= each[0]), (1, "bytes"))
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    shown = [kind for kind in KINDS if line.bytes_of[kind].any()]
    axes.stackplot(
        line.seconds,
        [line.bytes_of[kind] / size for kind in shown],
        labels=[f"{kind}, at most {size_of(line.peaks[kind])}" for kind in shown],
        colors=[_COLOURS[KINDS.index(kind)] for kind in shown],
        step="post",
        linewidth=0,
    )
    axes.axhline(line.peak / size, color="black", linewidth=0.8, linestyle=":")
    whole = float(line.seconds[-1]) or 1.0
    for name, begin, end in stages:
        axes.axvline(begin, color="black", linewidth=0.4, alpha=0.5)
        if end - begin >= _NARROW * whole:
            axes.text((begin + end) / 2, 1.01, transform=axes.get_xaxis_transform(), ha="center", fontsize=8,
                      **literal(name))  # fmt: skip
    axes.set_xlim(0, whole)
    axes.set_ylim(0, 1.05 * line.peak / size)
    axes.set_xlabel("seconds, under the profiler", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, reverse=True)
    figure.suptitle(**literal(title, "t"), fontsize=10)
    save_figure(figure, path, dpi=120)
