"""The engine benchmark as a picture: what fewer rows alone gain over the published loops, and how many times as fast as
its loop each lever makes an iteration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from flowgrove.report.figures import pyplot, save_figure

Row = dict[str, Any]
_COLOURS = (
    "#b9b9b9", "#d9a441", "#8fa8c8", "#1f4e8c", "#5b9a55", "#8c5b9a", "#c46a5a", "#4aa3a2", "#a8763e", "#d78fb3",
    "#6b6b6b", "#b5bd4c", "#2f3b52",
)  # fmt: skip
_ROWS, _DANCE = "#1f4e8c", "#8fa8c8"
_MUTED = "#666666"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind a number that a tick would cross


def plot_engine(rows: list[Row], path: Path) -> None:
    """Above, per recipe, the gain by rows alone of its last lever; below a bar per lever, with a tick where the counted
    passes would put it."""
    recipes, levers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("recipe", "lever"))
    size = (max(1.9 * len(recipes) + 2, 7), 7)  # titles want as much for one recipe
    figure, (above, below) = pyplot.subplots(2, 1, figsize=size, layout="constrained", height_ratios=[2, 3])
    _rows_alone(above, list({row["recipe"]: row for row in rows}.values()))
    _levers(below, [row for row in rows if row["speedup"] is not None], recipes, levers)
    handles = [*_patches(_COLOURS[: len(levers)]), pyplot.Line2D([], [], color="black", lw=1.2)]
    columns = len(levers) + 1 if len(recipes) > 4 else 3 if len(recipes) > 1 else 2
    names = [*levers, "predicted from passes"]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    first = rows[0]
    what = f"{first['model']}, {first['prompts']} prompts × 16 pictures"
    where = f"{first['device']}, {first['threads']} threads, torch {first['torch']}"
    figure.suptitle(f"{what}, {where}", fontsize=10, color=_MUTED)
    save_figure(figure, path, dpi=120)


def _rows_alone(axes: Axes, rows: list[Row]) -> None:
    drawn = (("rows_speedup", _ROWS), ("rows_over_dance", _DANCE))
    for place, row in enumerate(rows):
        bars = [(row[key], colour) for key, colour in drawn if row[key] is not None]
        for number, (value, colour) in enumerate(bars):
            x = place + 0.38 * (number - (len(bars) - 1) / 2)
            axes.bar(x, value, width=0.34, color=colour)
            _number(axes, x, value, ".2f" if value < 10 else ".1f")
    axes.set_xticks(range(len(rows)), [row["recipe"] for row in rows])
    axes.set_title("by fewer rows alone, at what they cost in full passes", fontsize=10, loc="left")
    axes.set_ylabel("× as cheap")
    if any(row["rows_over_dance"] is not None for row in rows):
        names = ["as its own published loop", "as DanceGRPO's"]
        legend = axes.legend(_patches((_ROWS, _DANCE)), names, fontsize=9, frameon=False, ncols=2, loc="lower right")
        legend.set_bbox_to_anchor((1, 1))
    _tidy(axes)


def _levers(axes: Axes, rows: list[Row], recipes: list[str], levers: list[str]) -> None:
    for row in rows:
        place = recipes.index(row["recipe"]) * (len(levers) + 1) + levers.index(row["lever"])
        axes.bar(place, row["speedup"], width=0.9, color=_COLOURS[levers.index(row["lever"])])
        axes.plot([place - 0.45, place + 0.45], [row["predicted_speedup"]] * 2, color="black", lw=1.2)
        _number(axes, place, row["speedup"], ".1f")
    axes.set_xticks([index * (len(levers) + 1) + (len(levers) - 1) / 2 for index in range(len(recipes))], recipes)
    axes.set_title("in seconds: fewer rows, fuller passes, fused ops, reused forwards", fontsize=10, loc="left")
    axes.set_ylabel("× as fast as its own published loop")
    _tidy(axes)


def _number(axes: Axes, x: float, value: float, form: str) -> None:
    how: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "zorder": 3, "bbox": _PAPER}
    axes.annotate(format(value, form), (x, value), (0, 2), **how)


def _patches(colours: Sequence[str]) -> list[Any]:
    return [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
