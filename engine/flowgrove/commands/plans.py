"""What a recipe will do and cost, before it runs."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from flowgrove.commands.options import AsJson, Overrides, RecipePath
from flowgrove.errors import UserError


def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    iteration: Annotated[int, typer.Option(min=0, max=999_999, help="which iteration, counted from 0")] = 0,
    as_json: AsJson = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="also predict the device's memory (takes half a minute)")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="also predict the seconds of an iteration and of the run (takes a minute)")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="with --time: at published rates of this device (h100, …); default: as measured here"),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="with --device: the share of the published rate; default 0.38"),
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="plan for so many processes of torchrun; with --memory also what they send")
    ] = 1,
) -> None:
    """Show steps, tree, counts and cost of an iteration; loads no model."""
    if (device or utilisation) and not time:
        raise UserError(f"{'--device' if device else '--utilisation'} is for predicted seconds: give --time, too")
    if utilisation and not device:
        raise UserError("--utilisation is a share of a published rate: give --device, too, like h100")
    from flowgrove.plan.division import Division
    from flowgrove.recipe.loading import load_recipe
    from flowgrove.report.cost_view import draw_time, time_json
    from flowgrove.report.plan_view import (
        draw_memory,
        draw_plan,
        draw_ranks,
        draw_rounding,
        draw_ways,
        memory_json,
        plan_json,
        rounding_json,
    )  # fmt: skip
    from flowgrove.report.split_view import chosen_splits, draw_splits, split_json
    from flowgrove.run.metrics import read_metrics
    from flowgrove.setup import Setup

    settings = load_recipe(recipe, tuple(set_ or ()))
    setup, division = Setup(settings), Division.of(settings.engine, ranks)
    lines = read_metrics(recipe.parent) if setup.split_search is not None else []
    table, made = setup.table, setup.plan(iteration, chosen_splits(settings, lines))
    device_type = "cpu" if settings.engine.device == "cpu" else "cuda"  # planned here, trained there
    predicted = seconds = rounding = None
    weighed: list[Any] | None = []
    if made.precision is not None:
        from flowgrove.plan.rounding import count_rounding

        rounding = count_rounding(settings)
    if memory or time:
        from flowgrove.tuning.checkpointing import settled_here

        setup, weighed = settled_here(setup, device_type, division)
        settings = setup.recipe
    if memory:
        from flowgrove.plan.communication import predict

        predicted = predict(settings, made, device_type, division)
    if time:
        from flowgrove.cost.run_time import predict_time

        seconds = predict_time(setup, division, device, utilisation)
    if as_json:
        content = plan_json(made, settings, division) | (memory_json(predicted) if predicted else {})
        content |= (time_json(seconds) if seconds else {}) | split_json(settings, lines)
        content |= rounding_json(made, rounding)
        sys.stdout.write(json.dumps(content) + "\n")
    else:
        draw_plan(made, settings, Console(highlight=False), table.source)
        draw_rounding(made, rounding, Console(highlight=False, soft_wrap=True))
        draw_splits(settings, lines, iteration, Console(highlight=False, soft_wrap=True))
        if division.ranks > 1:
            draw_ranks(made, settings, division, Console(highlight=False))
    if predicted is not None:
        draw_memory(predicted, device_type, division, Console(highlight=False, stderr=as_json))
    if predicted is not None or weighed is None:
        draw_ways(weighed, settings, Console(highlight=False, stderr=as_json, soft_wrap=True))
    if seconds is not None:
        draw_time(seconds, Console(highlight=False, stderr=as_json, soft_wrap=True))
