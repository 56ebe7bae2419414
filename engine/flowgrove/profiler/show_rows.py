"""Rows that are computed twice, on the terminal."""

from rich.console import Console

from flowgrove.profiler.equal_rows import RowLog
from flowgrove.recipe.schema import Recipe


def draw_rows(log: RowLog, recipe: Recipe, console: Console) -> None:
    """What each stage computes, and a line for each two stages that share rows."""
    console.print(", ".join(f"{stage} {rows:,} rows" for stage, rows in log.computed.items()), soft_wrap=True)
    repeated = log.repeated(recipe)
    if not repeated:
        console.print("no row is computed twice")
        return
    for one in repeated:
        reason = one.reason or "for no reason that is known"
        console.print(f"{one.rows:,} rows of {one.first} again in {one.again}: {reason}", soft_wrap=True)
