"""The quickstart's figures: they come from a run, whose reward curve is kept as a CSV, and its pictures as a plot.

`python profiling/make_figures.py --run runs/quickstart-42` takes both from the folder of that run.
"""

from collections.abc import Iterator
from pathlib import Path

from doc_figures.registry import FOLDER, ROOT, Row, Rows, numbers
from flowgrove.bench.table import write_columns

REWARD, BEFORE_AFTER = "quickstart_reward.csv", "quickstart_before_after.png"
_COLUMNS = ("seed", "iterations_behind", "training_reward", "held_out_reward")
_TRAIN, _HELD_OUT = "#8fa8c8", "#1f4e8c"


def take_run(run: Path, root: Path = ROOT) -> None:
    """Writes the curve of `run` and the pictures that its model drew before and after. Raises ValueError for a run
    without two evaluations of the same prompts."""
    from flowgrove.recipe.loading import load_recipe
    from flowgrove.report.grids import grid_files, in_common, load_grid
    from flowgrove.report.lines import evaluations
    from flowgrove.report.side_by_side import draw_side_by_side
    from flowgrove.run.metrics import read_metrics

    lines, recipe = read_metrics(run), load_recipe(run / "recipe.yaml")
    held_out = dict(evaluations(lines))
    training = {line["iteration"]: line["reward"][recipe.reward[0].name]["mean"] for line in lines}
    rows: Rows = [
        {
            "seed": recipe.run.seed, "iterations_behind": done,
            "training_reward": training.get(done), "held_out_reward": held_out.get(done),
        }
        for done in sorted({*training, *held_out})
    ]  # fmt: skip
    grids = grid_files(run)
    common = in_common(*(load_grid(grids[done]) for done in (min(grids), max(grids)))) if len(grids) > 1 else None
    if common is None:
        raise ValueError(
            f"{run} has no two grids of the same held-out prompts in samples/: give a whole quickstart run"
        )
    before, after = common
    names = (f"base model · {before.scores.mean():.2f}", f"after {max(grids)} iterations · {after.scores.mean():.2f}")
    write_columns(rows, _COLUMNS, root / FOLDER / REWARD)
    draw_side_by_side(before, after, names, root / FOLDER / BEFORE_AFTER)


def held_out(rows: Rows) -> list[Row]:
    return [row for row in rows if row["held_out_reward"] is not None]


def plot_reward(rows: Rows, path: Path) -> None:
    """The reward over iterations, of training prompts and of held-out ones."""
    from flowgrove.report.figures import pyplot, save_figure

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    trained = [row for row in rows if row["training_reward"] is not None]
    for drawn, key, style in (
        (trained, "training_reward", {"color": _TRAIN, "label": "training prompts, with exploration noise"}),
        (
            held_out(rows),
            "held_out_reward",
            {"color": _HELD_OUT, "marker": "o", "label": "held-out prompts, fixed seeds"},
        ),
    ):
        axes.plot([row["iterations_behind"] for row in drawn], [row[key] for row in drawn], **style)
    for row, below in ((held_out(rows)[0], 14), (held_out(rows)[-1], -8)):
        point = row["iterations_behind"], row["held_out_reward"]
        axes.annotate(f"{point[1]:.3f}", point, (0, -below), textcoords="offset points", ha="center", color=_HELD_OUT)
    axes.set(xlabel="iteration", ylabel="reward")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6")
    save_figure(figure, path)


@numbers("README.md", REWARD)
def readme(rows: Rows) -> Iterator[tuple[str, ...]]:
    first, last = (f"{held_out(rows)[place]['held_out_reward']:.2f}".removeprefix("0") for place in (0, -1))
    yield "[its reward](profiling/figures/quickstart_reward.png) rises from {} to {};", first, last
