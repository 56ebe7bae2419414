"""The shapes_* recipes at equal cost, each at its own best learning rate: tables and pictures."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from doc_figures.plan_memory import Planned
from doc_figures.recipes import SHAPES, facts_of
from doc_figures.registry import Rows, block, numbers, only, table
from flowgrove.compare.curves import Curve, Point, Search, summarise
from flowgrove.compare.picture import draw_curves

SEARCH = 100_000  # weighted passes at which the first seed chooses learning rates


@block("docs/algorithms.md", "compare_shapes.csv")
def equal_cost_shapes(rows: Rows) -> str:
    return _equal_cost(rows)


@block("docs/algorithms.md", "compare_pairs.csv")
def equal_cost_pairs(rows: Rows) -> str:
    return _equal_cost(rows)


@numbers("docs/algorithms.md", "compare_splits.csv")
def splits_by_evidence(rows: Rows) -> Iterator[tuple[str, ...]]:
    cost = f"{only(rows, recipe='auto')['cost']:,.0f}"
    told = (
        "after {} weighted passes `auto` has reached {} ({} to {}) on held-out prompts, splits at 0 and 1 {} ({} to {})"
    )
    found = (only(rows, recipe=name) for name in ("auto", "0, 1"))
    yield told, cost, *(f"{row[key]:.3f}" for row in found for key in ("mean", "lowest", "highest"))


def plot_curves(rows: Rows, path: Path) -> None:
    """Held-out reward over weighted passes, to what all recipes have spent with every seed, in whole thousands."""
    points: dict[tuple[str, float, int], list[Point]] = {}
    for row in rows:
        point = Point(*(row[key] for key in Point._fields))
        points.setdefault((row["recipe"], row["lr"], row["seed"]), []).append(point)
    curves = [Curve(*key, each) for key, each in points.items()]
    seeds = len({curve.seed for curve in curves})
    runs = Counter((curve.recipe, curve.lr) for curve in curves)
    rates = {recipe: lr for (recipe, lr), count in runs.items() if count == seeds}  # the others were only tried
    end = min(curve.points[-1].weighted_passes for curve in curves if curve.lr == rates[curve.recipe]) // 1000 * 1000
    found = summarise(curves, "weighted_passes", [end], Search(SEARCH, rates))
    draw_curves(curves, found, path, ["weighted_passes"])


def _equal_cost(rows: Rows) -> str:
    """The best at the largest cost first."""
    costs = sorted({row["cost"] for row in rows})
    ordered = sorted((row for row in rows if row["cost"] == costs[-1]), key=lambda row: -row["mean"])
    lines = []
    for last in ordered:
        name = last["recipe"]
        cells = [f"`{name}`", SHAPES[name].format(**facts_of(Planned(name).load())), f"{last['lr']:g}"]
        for cost in costs:
            row = only(rows, recipe=name, cost=cost)
            cells.append(f"**{row['mean']:.3f}** ({row['lowest']:.3f} to {row['highest']:.3f})")
        lines.append(tuple(cells))
    return table(("`recipes/`", "algorithm", "lr", *(f"{cost:,.0f} passes" for cost in costs)), lines)
