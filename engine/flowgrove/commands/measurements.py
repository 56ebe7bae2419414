"""A recipe's own speed on this machine: the settings that run it fastest, and where its time goes."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowgrove.commands.options import AllowPython, AsJson, Overrides, RecipePath
from flowgrove.commands.shell import allow, say
from flowgrove.errors import UserError


def tune(
    recipe: RecipePath,
    set_: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="the recipe to write; default: NAME_tuned.yaml beside NAME.yaml")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="also measure engine.compile, which takes minutes")
    ] = False,
    precision: Annotated[
        bool,
        typer.Option("--precision", help="also measure rollout.precision, which changes training pictures a little"),
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="also measure model.gradient_checkpointing, of which some may fit")
    ] = False,
    attention: Annotated[
        bool,
        typer.Option("--attention", help="also measure rollout.attention, which changes training pictures a little"),
    ] = False,
) -> None:
    """Measure which engine settings run a recipe fastest on this machine,
    and write a recipe that extends it with them.

    What passes take is kept for `flowgrove plan --time`.
    """
    from flowgrove.tuning.tune import tune_recipe

    target = tune_recipe(recipe, tuple(set_ or ()), out, compiled, say, precision, checkpointing, attention)
    say(f"wrote {target}: train with `flowgrove train {target}`")


def profile(
    recipe: RecipePath,
    set_: Overrides = None,
    iterations: Annotated[int, typer.Option(min=1, help="iterations that are timed, and again profiled")] = 1,
    warm_up: Annotated[int, typer.Option("--warm-up", min=0, help="iterations before them")] = 1,
    out: Annotated[Path | None, typer.Option(help="folder for its files; default: profiles/NAME")] = None,
    equal_rows: Annotated[
        bool, typer.Option("--equal-rows", help="instead, list the rows that the iterations compute twice, and why")
    ] = False,
    as_json: AsJson = False,
    allow_python: AllowPython = False,
) -> None:
    """Say where the time and the memory of an iteration go on this machine, and what to try next.

    Writes the table of phases (CSV, JSON), a trace for Perfetto, and a timeline of memory; no run folder.
    """
    allow(allow_python)
    from flowgrove.recipe.loading import load_recipe

    settings = load_recipe(recipe, tuple(set_ or ()))
    if equal_rows:
        from flowgrove.profiler.equal_rows import log_rows
        from flowgrove.profiler.show_rows import draw_rows
        from flowgrove.setup import Setup

        if as_json:
            raise UserError("--equal-rows prints a table: leave --json out")
        draw_rows(log_rows(Setup(settings), iterations), settings, Console(highlight=False))
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what the profiler notes of memory from before it
    from flowgrove.profiler.command import profile_recipe
    from flowgrove.profiler.show import draw_profile
    from flowgrove.setup import Setup

    folder = out or Path("profiles") / recipe.stem
    found = profile_recipe(recipe.name, Setup(settings), folder, iterations, warm_up, say)
    if as_json:
        sys.stdout.write(json.dumps(found.as_json()) + "\n")
    else:
        draw_profile(found, Console(highlight=False))
