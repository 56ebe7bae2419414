"""The curves of a comparison as a picture: reward over weighted passes and over seconds, each recipe at its own best
learning rate.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from flowgrove.compare.curves import Curve, Reached
from flowgrove.compare.goal import AXES, Axis
from flowgrove.compare.runs import rate_text
from flowgrove.compare.tables import chosen_by, in_words
from flowgrove.report.figures import literal, pyplot, save_figure

# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow, which is too light for a line
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))  # one for every time that the colours are used
_MUTED = "#666666"
_BETWEEN = 0.052  # of an axis's height: two labels
_SAMPLES = 200
_COSTS: dict[Axis, str] = {
    "weighted_passes": "weighted passes: rollout forwards + 3 × train passes",
    "seconds": "seconds of the stages, without evaluations",
}
Floats = NDArray[np.float64]


def draw_curves(curves: list[Curve], found: list[Reached], path: Path, shown: Sequence[Axis] = AXES) -> None:
    """Writes the picture, a panel over each cost that is `shown`. `found`: recipes at costs, of which those at the
    largest are drawn, the best first. A line is the mean over seeds and ends at that cost, its band reaches from the
    worst to the best of them.
    """
    rows = [one for one in found if one.cost == found[-1].cost]
    names = dict.fromkeys(curve.recipe for curve in curves)  # a recipe keeps its colour whatever it reaches
    styles = {name: _style(number) for number, name in enumerate(names)}
    figure, panels = pyplot.subplots(len(shown), 1, figsize=(8, 4.6 * len(shown)), layout="constrained", squeeze=False)
    for axes, axis in zip(panels[:, 0], shown, strict=True):
        _panel(axes, axis, [(one, _runs(curves, one), styles[one.recipe]) for one in rows])
        axes.set_xlabel(_COSTS[axis])
    seeds = len(rows[0].seeds)
    told = f"Mean over {seeds} seeds, band from the worst to the best of them" if seeds > 1 else "One seed"
    several = any(len(one.tried) > 1 for one in rows)
    rates = f"Each recipe at its own best learning rate: the one with the {chosen_by(rows[0])}." if several else ""
    figure.suptitle(
        f"{told}; lines end at {in_words(rows[0])}.\n{rates}",
        fontsize=9, x=0.01, ha="left", color=_MUTED,
    )  # fmt: skip
    save_figure(figure, path)


def over_seeds(curves: list[Curve], axis: Axis, most: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Costs up to `most` to which all of the runs have come, and there the mean, the lowest and the highest held-out
    reward.
    """
    end = min(getattr(curve.points[-1], axis) for curve in curves)
    costs = np.linspace(0.0, min(end, most), _SAMPLES)
    each = np.array(
        [
            np.interp(
                costs,
                [getattr(point, axis) for point in curve.points],
                [point.held_out_reward for point in curve.points],
            )
            for curve in curves
        ]
    )
    return costs, each.mean(0), each.min(0), each.max(0)


def _runs(curves: list[Curve], one: Reached) -> list[Curve]:
    return [curve for curve in curves if (curve.recipe, curve.lr) == (one.recipe, one.lr)]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "ls": _DASHES[number // len(_COLOURS) % len(_DASHES)],
    }


def _panel(axes: Axes, axis: Axis, drawn: Sequence[tuple[Reached, list[Curve], dict[str, Any]]]) -> None:
    ends = []
    for one, runs, style in drawn:
        costs, mean, lowest, highest = over_seeds(runs, axis, getattr(one, axis))
        axes.fill_between(costs, lowest, highest, color=style["color"], alpha=0.13, lw=0)
        axes.plot(costs, mean, lw=1.8, **style)
        spent = f"{costs[-1]:,.0f} s" if axis == "seconds" else f"{costs[-1]:,.0f} passes"
        told = f"{one.mean:.3f}, lr {rate_text(one.lr)}" if axis == one.axis else spent
        ends.append((costs[-1], mean[-1], f"{one.recipe}  {told}", style["color"]))
    axes.set_ylabel("held-out reward")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    _label(axes, ends)


def _label(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """The names right of the axes, level with their lines' ends as far as there is room, joined to them."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    places = spaced([(reward - low) / (high - low) for _, reward, _, _ in ordered], _BETWEEN)
    for (cost, reward, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            **literal(name, "text"), xy=(cost, reward), xycoords="data", xytext=(1.03, place),
            textcoords="axes fraction", color=colour, fontsize=8, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 1,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spaced(wanted: list[float], between: float) -> list[float]:
    """Places between 0 and 1 near the ascending ones that are wanted, so far from each other: neighbours that are too
    close spread around their own mean.
    """
    groups: list[list[float]] = []  # wanted places of neighbours that stand together

    def span(group: list[float]) -> tuple[float, float]:
        middle, half = sum(group) / len(group), between * (len(group) - 1) / 2
        middle = max(half, min(1 - half, middle))
        return middle - half, middle + half

    for place in wanted:
        groups.append([place])
        while len(groups) > 1 and span(groups[-1])[0] - span(groups[-2])[1] < between:
            last = groups.pop()
            groups[-1] += last
    return [span(group)[0] + between * number for group in groups for number in range(len(group))]
