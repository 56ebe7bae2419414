"""Commands that explain keys, metrics and this installation."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flowgrove.commands.options import AsMarkdown


def recipe_(
    key: Annotated[
        str | None, typer.Argument(help="a section or a key, like rollout.window", show_default=False)
    ] = None,
    markdown: AsMarkdown = False,
) -> None:
    """Explain recipe keys: all on a line each, the keys of a section, or one in full."""
    from flowgrove.report.reference import draw_recipe, recipe_page

    if markdown:
        sys.stdout.write(recipe_page())
    else:
        draw_recipe(key, Console(highlight=False))


def metrics(
    key: Annotated[str | None, typer.Argument(help="like ratio_mean; default: all", show_default=False)] = None,
    markdown: AsMarkdown = False,
) -> None:
    """Explain what a run writes of every iteration: meaning, what is healthy, what to do where it is not."""
    from flowgrove.report.reference import draw_metrics, metrics_page

    if markdown:
        sys.stdout.write(metrics_page())
    else:
        draw_metrics(key, Console(highlight=False))


def doctor() -> None:
    """Say what this installation has: versions, devices, backends, and what is missing."""
    from flowgrove.doctor import findings

    console = Console(highlight=False, soft_wrap=True)
    for name, value in findings():
        console.print(f"[dim]{name:<22}[/]{escape(value)}")
