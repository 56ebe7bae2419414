"""The scaling benchmark as a picture: seconds over leaves and over prompts against a line of slope 1,
and the engine's time per node below.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flowgrove.bench.scaling_fit import upper_half
from flowgrove.report.figures import pyplot, save_figure

_MEASURED, _LINE, _MUTED = "#1f4e8c", "#d9a441", "#666666"
Row = dict[str, Any]


def plot_scaling(rows: list[Row], path: Path) -> None:
    """A column of panels per sweep."""
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure, grid = pyplot.subplots(
        2, len(sweeps), figsize=(4.6 * len(sweeps), 6), layout="constrained", squeeze=False,
        sharex="col", sharey="row", height_ratios=[3, 2],
    )  # fmt: skip
    for column, sweep in zip(grid.T, sweeps, strict=True):
        members = [row for row in rows if row["sweep"] == sweep]
        _seconds(column[0], members, sweep)
        _overhead(column[1], members, sweep)
        column[-1].set_xlabel(f"{sweep} per {'prompt' if sweep == 'leaves' else 'iteration'}")
        column[-1].set_xticks([row[sweep] for row in members], [str(row[sweep]) for row in members])
    grid[0, 0].set_ylabel("seconds per iteration")
    grid[1, 0].set_ylabel("µs per node outside\ntransformer and reward")
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['device']}, {first['threads']} thread{'s' * (first['threads'] > 1)}, "
        f"torch {first['torch']}\n"
        f"median of {first['rounds']} interleaved round{'s' * (first['rounds'] > 1)}",
        fontsize=10, color=_MUTED,
    )  # fmt: skip
    save_figure(figure, path)


def _seconds(axes: Axes, rows: list[Row], sweep: str) -> None:
    x, y = ([row[key] for row in rows] for key in (sweep, "seconds"))
    level = math.exp(statistics.mean(math.log(row["seconds"] / row[sweep]) for row in upper_half(rows)))
    axes.plot(x, [level * value for value in x], color=_LINE, label="slope 1 through the upper half")
    axes.plot(x, y, color=_MEASURED, marker="o", ms=5, lw=0, label=f"measured, exponent {rows[0]['exponent']:.2f}")
    axes.set_title(_fixed(rows[0], sweep), fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    _tidy(axes)


def _overhead(axes: Axes, rows: list[Row], sweep: str) -> None:
    points = [(row[sweep], row["outside_us_per_node"]) for row in rows]
    axes.plot(*zip(*points, strict=True), color=_MEASURED, marker="o", ms=5, lw=1)
    for point in points:
        axes.annotate(
            f"{point[1]:.3g}", point, (0, 6), textcoords="offset points", ha="center", fontsize=8, color=_MUTED
        )
    axes.margins(y=0.2)
    _tidy(axes)


def _fixed(row: Row, sweep: str) -> str:
    return f"{row['prompts']} prompts" if sweep == "leaves" else f"{row['leaves']} leaves per prompt"


def _tidy(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_tick_params(labelleft=True)
