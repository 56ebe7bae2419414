"""The engine benchmark as a picture: how many times as fast as the published loop each lever makes an iteration."""

from pathlib import Path
from typing import Any

from flowgrove.figures import pyplot, save_figure

_COLOURS = ("#b9b9b9", "#d9a441", "#8fa8c8", "#1f4e8c", "#5b9a55", "#8c5b9a")
_MUTED = "#666666"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind a number that a tick would cross


def plot_engine(rows: list[dict[str, Any]], path: Path) -> None:
    """A group of bars per recipe, one bar per lever; a tick where the counted passes would put it."""
    recipes, levers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("recipe", "lever"))
    figure, axes = pyplot.subplots(figsize=(2.2 * len(recipes) + 1.5, 4.4), layout="constrained")
    for row in rows:
        place = recipes.index(row["recipe"]) * (len(levers) + 1) + levers.index(row["lever"])
        axes.bar(place, row["speedup"], width=0.9, color=_COLOURS[levers.index(row["lever"])])
        axes.plot([place - 0.45, place + 0.45], [row["predicted_speedup"]] * 2, color="black", lw=1.2)
        axes.annotate(f"{row['speedup']:.1f}", (place, row["speedup"]), (0, 2), textcoords="offset points", ha="center", fontsize=8, zorder=3, bbox=_PAPER)
    axes.set_xticks([index * (len(levers) + 1) + (len(levers) - 1) / 2 for index in range(len(recipes))], recipes)
    axes.set_ylabel("× as fast as the published loop")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS[: len(levers)]] + [pyplot.Line2D([], [], color="black", lw=1.2)]
    figure.legend(
        handles, [*levers, "predicted from passes"], loc="outside lower center", ncols=len(levers) + 1 if len(recipes) > 4 else 3, fontsize=9, frameon=False
    )
    first = rows[0]
    where = f"{first['model']}, {first['prompts']} prompts × 16 pictures, {first['device']}, {first['threads']} threads, torch {first['torch']}"
    figure.suptitle(where, fontsize=10, color=_MUTED)
    save_figure(figure, path, dpi=120)
