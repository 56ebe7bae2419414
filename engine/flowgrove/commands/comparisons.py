"""Recipes against each other."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowgrove.commands.options import AllowPython, AsJson, Overrides
from flowgrove.commands.shell import allow, console, say


def compare(
    recipes: Annotated[list[Path], typer.Argument(help="recipes (YAML)", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for runs, tables and picture; the same one goes on")],
    seeds: Annotated[str, typer.Option(help="of every recipe, with commas between")] = "1,2,3",
    lr: Annotated[
        str | None, typer.Option("--lr", help="learning rates, with commas between; default: each recipe's own")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=2, help="of every run; default: each recipe's own")] = None,
    cost: Annotated[
        str | None,
        typer.Option(help="weighted passes that every run trains to; where they are several, rewards are read at each"),
    ] = None,
    seconds: Annotated[str | None, typer.Option(help="the same in seconds of the stages, on a quiet machine")] = None,
    search: Annotated[
        float | None,
        typer.Option(help="try learning rates with the first seed up to this cost alone, and go on with the best"),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="runs at a time; default: one a core on a CPU, one on a GPU")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    allow_python: AllowPython = False,
) -> None:
    """Train recipes at several learning rates over seeds, and say what each reaches at equal cost and its own best one.

    Weighted passes are rollout forwards + 3 × train passes. Writes summary.csv, curves.csv, rewards.png and the runs.
    """
    allow(allow_python)
    from flowgrove.compare.runs import comparison_of

    asked = comparison_of(recipes, out, tuple(set_ or ()), seeds, lr, iterations, cost, seconds, search)
    from flowgrove.compare.command import check, written
    from flowgrove.compare.command import compare as run
    from flowgrove.compare.tables import comparison_json, draw_comparison

    result = run(asked, jobs, say, console)
    if as_json:
        content = comparison_json(result.curves, result.found, result.failures, result.machine, out)
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        draw_comparison(result.found, Console(highlight=False))
    say(written(out, result.found))
    check(result.failures, len(asked.runs))
