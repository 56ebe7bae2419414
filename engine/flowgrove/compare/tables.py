"""A comparison as tables: CSV files, JSON, and on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowgrove.bench.table import Row, write_columns
from flowgrove.compare.curves import Curve, Reached
from flowgrove.compare.processes import Failure
from flowgrove.compare.runs import rate_text

_POINTS = (
    "recipe", "lr", "seed", "iteration", "weighted_passes", "seconds", "held_out_reward", "training_reward",
)  # fmt: skip
_SUMMARY = (
    "at", "cost", "recipe", "lr", "mean", "std", "lowest", "highest", "rewards", "seeds", "before", "iterations",
    "weighted_passes", "seconds", "tried", "untried", "lr_chosen_by", "machine",
)  # fmt: skip


def point_rows(curves: list[Curve]) -> list[Row]:
    """One row per evaluation of every run."""
    return [
        {"recipe": curve.recipe, "lr": curve.lr, "seed": curve.seed, **point._asdict()}
        for curve in curves
        for point in curve.points
    ]


def summary_rows(found: list[Reached], machine: str) -> list[Row]:
    """One row per recipe and cost."""
    return [
        {
            "at": one.axis,
            "cost": one.cost,
            "recipe": one.recipe,
            "lr": one.lr,
            "mean": round(one.mean, 4),
            "std": round(one.std, 4),
            "lowest": round(min(one.rewards), 4),
            "highest": round(max(one.rewards), 4),
            "rewards": " ".join(f"{reward:.4f}" for reward in one.rewards),
            "seeds": " ".join(map(str, one.seeds)),
            "before": round(one.before, 4),
            "iterations": round(one.iterations, 1),
            "weighted_passes": round(one.weighted_passes),
            "seconds": round(one.seconds, 1),
            "tried": _rates(one.tried, " "),
            "untried": _rates(one.untried, " "),
            "lr_chosen_by": chosen_by(one),
            "machine": machine,
        }
        for one in found
    ]


def chosen_by(one: Reached) -> str:
    """How its learning rate was chosen."""
    if one.search is None:
        return "highest mean over seeds at this cost"
    return f"highest reward of seed {one.seeds[0]} at {_amount(one.search, one)}"


def write_tables(curves: list[Curve], found: list[Reached], machine: str, out: Path) -> None:
    """curves.csv and summary.csv in the folder `out`."""
    write_columns(point_rows(curves), _POINTS, out / "curves.csv")
    write_columns(summary_rows(found, machine), _SUMMARY, out / "summary.csv")


def comparison_json(
    curves: list[Curve], found: list[Reached], failures: list[Failure], machine: str, out: Path
) -> dict[str, Any]:
    """What the CSV files hold, the runs that failed, and what is where."""
    return {
        "out": str(out),
        "summary": summary_rows(found, machine),
        "curves": point_rows(curves),
        "failed": [{"run": str(failure.run.folder), "reason": failure.reason} for failure in failures],
    }


def draw_comparison(found: list[Reached], console: Console) -> None:
    """A table per cost, the best recipe first, and what to try next."""
    for cost in dict.fromkeys(one.cost for one in found):
        rows = [one for one in found if one.cost == cost]
        console.print(f"held-out reward at {in_words(rows[0])}", style="bold")
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for heading in ("recipe", "lr", "mean", "over seeds", "iterations", "passes", "seconds"):
            table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=True)
        for one in rows:
            table.add_row(
                escape(one.recipe), rate_text(one.lr), f"{one.mean:.3f}",
                f"{min(one.rewards):.3f}…{max(one.rewards):.3f}",
                f"{one.iterations:.0f}", f"{one.weighted_passes:,.0f}", f"{one.seconds:,.0f}",
            )  # fmt: skip
        console.print(table)
        console.print()
    for note in notes(found):
        console.print(note, markup=False, soft_wrap=True)


def in_words(one: Reached) -> str:
    """The cost that rewards are read at."""
    return _amount(one.cost, one)


def _amount(cost: float, one: Reached) -> str:
    return f"{cost:,.0f} {'weighted passes' if one.axis == 'weighted_passes' else 'seconds of stages'}"


def notes(found: list[Reached]) -> list[str]:
    """How the learning rates were chosen, and which recipes may do better at others."""
    if not found:
        return []
    how = chosen_by(found[0]).replace("over seeds", f"over {len(found[0].rewards)} seeds")
    told = [
        f"Each recipe at its own best learning rate: the one of the {how}."
        if any(len(one.tried) > 1 for one in found)
        else "Each recipe at the one learning rate that was tried."
    ]
    behind = {one.recipe: tuple(rate for rate in one.untried if rate not in one.unscored) for one in found}
    lost = {one.recipe: one.unscored for one in found}
    for some, why in (
        (behind, "have not come so far on all seeds"),
        (lost, "have trained so far, but their last evaluation could not be scored (see the .log of the runs),"),
    ):
        if any(some.values()):
            listed = "; ".join(f"{recipe} {_rates(rates, ', ')}" for recipe, rates in some.items() if rates)
            told.append(f"Some learning rates {why} and do not count yet: {listed}")
    last = [one for one in found if one.cost == found[-1].cost]
    for edge, other in (("largest", "larger"), ("smallest", "smaller")):
        if names := [one.recipe for one in last if one.at_the_edge == edge]:
            told.append(f"Best at the {edge} learning rate tried, so try {other} ones: {', '.join(names)}.")
    return told


def _rates(rates: tuple[float, ...], between: str) -> str:
    return between.join(rate_text(rate) for rate in rates)
