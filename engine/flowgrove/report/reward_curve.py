"""The reward of a run over its iterations, as a PNG."""

from pathlib import Path

from matplotlib.ticker import MaxNLocator

from flowgrove.recipe.schema import Recipe
from flowgrove.report.figures import literal, pyplot, save_figure
from flowgrove.report.lines import Line, evaluations, total_reward

_TRAIN, _HELD_OUT = "#8fa8c8", "#1f4e8c"
Points = list[tuple[int, float]]


def draw_reward_curve(lines: list[Line], recipe: Recipe, path: Path) -> None:
    """Training and held-out reward of a run."""
    training = [(line["iteration"], total_reward(recipe, line)) for line in lines]
    draw_rewards(
        training, evaluations(lines, recipe.run.iterations), " + ".join(reward.title for reward in recipe.reward), path
    )


def draw_rewards(training: Points, held_out: Points, name: str, path: Path) -> None:
    """(iteration, reward) of both kinds of prompts; the first and the last held-out reward stand in numbers."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*training, strict=True), color=_TRAIN, label="training prompts, with exploration noise")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", label="held-out prompts, fixed seeds")
        for place in {0, len(held_out) - 1}:
            above = place > 0
            axes.annotate(
                f"{held_out[place][1]:.3f}",
                held_out[place],
                (0, 8 if above else -14),
                textcoords="offset points",
                ha="center",
                color=_HELD_OUT,
            )
    axes.set(xlabel="iteration")
    axes.set_ylabel(**literal(name, "ylabel"))
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_figure(figure, path)
