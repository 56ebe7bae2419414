"""The report of a run: one HTML file that needs no other and no network, the reward curve, and the same prompts and
seeds before and after as PNGs.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.recipe.schema import Recipe
from flowgrove.report.content import metric_texts, readable, run_content
from flowgrove.report.grids import Grid, in_common
from flowgrove.report.lines import whole_lines
from flowgrove.report.pictures import chosen_grids
from flowgrove.report.reward_curve import draw_reward_curve
from flowgrove.report.side_by_side import draw_side_by_side

_STYLES, _SCRIPTS = ("report.css", "forest.css"), ("charts.js", "pictures.js", "forest.js", "report.js")


def write_report(recipe: Recipe, out: Path) -> Path:
    """Writes report.html, reward.png and (with held-out prompts) before_after.png into the run folder, and returns the
    page.

    Raises UserError if metrics.jsonl holds no line of this recipe.
    """
    lines = whole_lines(recipe, out)
    if not lines:
        log = out / "metrics.jsonl"
        raise UserError(f"{log} holds no line of this recipe: give the folder of a run that has trained")
    draw_reward_curve(lines, recipe, out / "reward.png")
    _compare(chosen_grids(out, 2), out / "before_after.png")
    write_text(out / "report.html", report_page([run_content(recipe, out)], out.name))
    return out / "report.html"


def report_page(contents: list[dict[str, Any]], title: str, live: bool = False) -> str:
    """One page of the runs whose `run_content` is given, beside each other where they are several. `live`: the page
    asks whoever serves it for newer ones.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("flowgrove.report")
    environment = Environment(loader=loader, autoescape=True)

    def part(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    scripts = [part(name) for name in (*_SCRIPTS, *(["live.js"] if live else []))]
    return environment.get_template("report.html.j2").render(
        title=readable(title), style=Markup("").join(map(part, _STYLES)), scripts=scripts,
        plotly=Markup(get_plotlyjs()), data=Markup(_for_script({"runs": contents, "metrics": metric_texts()})),
    )  # fmt: skip


def _for_script(data: Any) -> str:
    """JSON that can stand in a <script>: without a <, no tag and no comment begins in it."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _compare(grids: list[tuple[int, Grid]], path: Path) -> None:
    """Draws what the first and the last grid show of the same prompts and seeds, if there is anything."""
    common = in_common(grids[0][1], grids[-1][1]) if len(grids) > 1 else None
    if common is None:
        path.unlink(missing_ok=True)  # of an earlier report
        return
    before, after = common
    first, last = (f"after {done} iterations" if done else "base model" for done, _ in (grids[0], grids[-1]))
    names = (f"{first} · {before.scores.mean():.2f}", f"{last} · {after.scores.mean():.2f}")
    draw_side_by_side(before, after, names, path)
