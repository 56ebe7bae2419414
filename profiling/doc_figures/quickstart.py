"""The quickstart's figures: they come from a run, whose reward curve is kept as a CSV, and its pictures as a plot.

`python profiling/make_figures.py --run runs/quickstart-42` takes both from the folder of that run.
"""

from collections.abc import Iterator
from pathlib import Path

from doc_figures.registry import FOLDER, ROOT, Rows, numbers
from flowgrove.bench.table import write_columns

REWARD, BEFORE_AFTER = "quickstart_reward.csv", "quickstart_before_after.png"
_COLUMNS = ("seed", "iterations_behind", "training_reward", "held_out_reward")


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


def rewards(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(iterations behind, reward)."""
    return [(row["iterations_behind"], row[key]) for row in rows if row[key] is not None]


def plot_reward(rows: Rows, path: Path) -> None:
    """The reward over iterations, of training prompts and of held-out ones."""
    from flowgrove.report.reward_curve import draw_rewards

    draw_rewards(rewards(rows, "training_reward"), rewards(rows, "held_out_reward"), "reward", path)


@numbers("README.md", REWARD)
def readme(rows: Rows) -> Iterator[tuple[str, ...]]:
    held_out = rewards(rows, "held_out_reward")
    first, last = (f"{held_out[place][1]:.2f}".removeprefix("0") for place in (0, -1))
    yield "[its reward](profiling/figures/quickstart_reward.png) rises from {} to {};", first, last
