"""The keys of recipes and of metrics lines as a person reads them: on a terminal, and as the pages docs/recipe.md and
docs/metrics.md.
"""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flowgrove.recipe.keys import Key, find_key, recipe_keys
from flowgrove.run.metric_keys import METRICS, find_metric

_WIDTH = 160  # where no terminal gives one
_RECIPE = """\
# Recipe keys

<!-- Written by `make docs` from engine/flowgrove/recipe/schema/: change it there. -->

A recipe is a YAML file. It must say `model.adapter`, `model.path`, `data.prompts` and `reward`; every other key has the
default that stands here. `extends: other.yaml` takes over all keys of another recipe that this one does not set, and
`--set update.lr=3e-4` changes one for a single command. An unknown key is an error that names the nearest one.

`flowgrove recipe` lists all keys, `flowgrove recipe rollout.window` those of a section, `flowgrove recipe
update.clip_range` tells of one; `flowgrove plan RECIPE` shows what a recipe amounts to before anything is trained.
"""
_METRICS = """\
# Metrics of an iteration

<!-- Written by `make docs` from engine/flowgrove/run/metric_keys.py: change it there. -->

`metrics.jsonl` in a run folder holds one JSON object per iteration; TensorBoard and other trackers show the same
numbers, nested ones as `seconds/update`. `flowgrove metrics` lists the keys, `flowgrove metrics ratio_mean` tells of
one.
"""


def draw_recipe(name: str | None, console: Console) -> None:
    """All keys on a line each; a section's; or one key in full. Raises UserError for a name that is no key."""
    if name is None:
        _draw_keys(recipe_keys(), console)
        return
    key, below = find_key(name)
    if key.section:
        _draw_texts(key.name, console, key.summary, key.details, _source(key))
        console.print()
        _draw_keys(below, console)
    else:
        facts = (f"Default: {key.default}", f"Allowed: {key.values}")
        _draw_texts(key.name, console, *facts, key.summary, key.details, _source(key))


def draw_metrics(name: str | None, console: Console) -> None:
    """All keys of a metrics line, or one in full. Raises UserError for a name that is no key."""
    if name is None:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("key", no_wrap=True)
        table.add_column("meaning")
        for metric in METRICS:
            table.add_row(metric.key, escape(metric.meaning))
        _wide(console).print(table)
    else:
        metric = find_metric(name)
        _draw_texts(metric.key, console, metric.meaning, f"Healthy: {metric.healthy}", f"Else: {metric.otherwise}")


def recipe_page() -> str:
    """docs/recipe.md: a table for each section."""
    sections = [key for key in recipe_keys() if key.section]
    return "\n".join([_RECIPE, *(line for section in sections for line in _section_page(section))])


def metrics_page() -> str:
    """docs/metrics.md."""
    rows = (
        (f"`{metric.key}`", _cell(metric.meaning), _cell(metric.healthy), _cell(metric.otherwise)) for metric in METRICS
    )
    return "\n".join([_METRICS, *_table(("key", "meaning", "healthy", "else"), rows), ""])


def _section_page(section: Key) -> list[str]:
    """The heading of a section, what it is, and its own keys; sections in it follow with headings of their own."""
    text = " ".join(part for part in (section.summary, section.details, _source(section)) if part)
    absent = "" if section.default != "null" else " Default: `null`."
    rows = (
        (
            f"`{key.name.rpartition('.')[2]}`",
            "" if key.default == "" else f"`{key.default}`" if key.default != "required" else "required",
            "a section, below" if key.section else _cell(key.values),
            _cell(f"**{key.summary}** {'' if key.section else key.details}".strip())
            + ("" if key.section else f"<br>*{_source(key)}*"),
        )
        for key in find_key(section.name)[1]
    )
    return [f"## `{section.name}`", "", text + absent, "", *_table(("key", "default", "values", ""), rows), ""]


def _draw_keys(keys: Iterable[Key], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("key", no_wrap=True)
    table.add_column("default")
    table.add_column("values", max_width=34)
    table.add_column("")
    for key in keys:
        name = f"[bold]{key.name}[/]" if key.section else key.name
        table.add_row(name, escape(key.default), "" if key.section else escape(key.values), escape(key.summary))
    _wide(console).print(table)


def _draw_texts(heading: str, console: Console, *texts: str) -> None:
    console.print(f"[bold]{heading}[/]")
    for text in filter(None, texts):
        console.print(Padding(escape(text), (0, 2), expand=False))


def _wide(console: Console) -> Console:
    """The same, wide enough for a table where it goes to a file or a pipe."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    return console


def _source(key: Key) -> str:
    return f"Source: {key.source}" if key.source else ""


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heads, ("---",) * len(heads), *rows)]
