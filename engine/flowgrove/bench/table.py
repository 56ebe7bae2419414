"""Benchmarks as tables: on the terminal, and as CSV files."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flowgrove.files import write_text

Row = dict[str, Any]
# 80 columns hold no more; the CSV has the rest
_HEADINGS = ("contender", "µs", "q10", "q90", "% copy", "× eager", "launches", "MiB")
_REPLAYED = ("graph µs", "% copy", "× eager")  # on a GPU: inside a CUDA graph, where no launch is waited for


def draw_rows(rows: list[Row], console: Console) -> None:
    """One table per case, shape and dtype: medians and quantiles, the share of the copy bandwidth,
    memory beyond the outputs.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = (
            f"{row['op']}, {row['case']}, {row['shape']} ({row['rows']} × {row['elements']:,}), {row['dtype']}; "
            f"copy {row['copy_gb_per_s']:.1f} GB/s"
        )
        groups.setdefault(title, []).append(row)
    for title, members in groups.items():
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        replayed = any(row["graph_us"] is not None for row in members)
        for heading in (*_HEADINGS, *(_REPLAYED if replayed else ())):
            table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
        for row in members:
            table.add_row(
                row["contender"],
                f"{row['median_us']:,.0f}",
                f"{row['q10_us']:,.0f}",
                f"{row['q90_us']:,.0f}",
                f"{row['percent_of_copy']:.0f}",
                "" if row["speedup_vs_eager"] is None else f"{row['speedup_vs_eager']:.2f}",
                str(row["launches"]),
                f"{row['peak_extra_bytes'] / 2**20:.1f}",
                *(
                    (
                        _number(row["graph_us"], ".1f"),
                        _number(row["graph_percent_of_copy"], ".0f"),
                        _number(row["graph_speedup_vs_eager"], ".2f"),
                    )
                    if replayed
                    else ()
                ),
            )
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
        console.print()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_engine(rows: list[Row], console: Console) -> None:
    """One table, 80 columns wide: passes, seconds, and how many times as cheap as its published loop each lever is, by
    fewer rows alone and in seconds; then the same against DanceGRPO's published loop where that was run."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    ratios = [("rows\n×", "rows_speedup", ".2f"), ("time\n×", "speedup", ".2f")]
    if any(row["over_dance"] is not None for row in rows):
        ratios += [("dance\nrows ×", "rows_over_dance", ".1f"), ("dance\ntime ×", "over_dance", ".1f")]
    for heading in ("recipe", "lever", "passes", "s", *(heading for heading, _, _ in ratios)):
        table.add_column(heading, justify="left" if heading in ("recipe", "lever") else "right", no_wrap=True)
    last = None
    for row in rows:
        table.add_row(
            "" if row["recipe"] == last else row["recipe"],
            row["lever"],
            f"{row['rollout_forwards']:.0f}+{row['train_passes']:.0f}",
            f"{row['seconds']:.2f}",
            *(_number(row[key], form) for _, key, form in ratios),
        )
        last = row["recipe"]
    console.print(table)


def draw_scaling(rows: list[Row], console: Console) -> None:
    """One table: passes, nodes and seconds of every point,
    and the microseconds per node outside the transformer where the host's clock tells them.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("sweep", "leaves", "prompts", "passes", "nodes", "s", "µs/node", "exponent"):
        table.add_column(heading, justify="left" if heading == "sweep" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["sweep"],
            str(row["leaves"]),
            str(row["prompts"]),
            f"{row['rollout_forwards']}+{row['train_passes']}",
            str(row["nodes"]),
            f"{row['seconds']:.3f}",
            f"{row['outside_us_per_node']:.0f}",
            f"{row['exponent']:.3f}",
        )
    console.print(table)


def draw_row_times(rows: list[Row], console: Console) -> None:
    """One table: milliseconds of a row, and how much of the arithmetic that a second holds its forward does."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("blocks", "rows", "mode", "forward ms", "with backward", "TFLOP/s", ""):
        table.add_column(heading, justify="left" if heading in ("blocks", "mode", "") else "right", no_wrap=True)
    for row in rows:
        times = (_number(row[key], ".2f") for key in ("forward_ms", "train_ms"))
        rate = _number(row["forward_tflop_per_s"], ".4g")
        table.add_row(row["blocks"], str(row["rows"]), row["mode"], *times, rate, "derived" if row["derived"] else "")
    console.print(table)


def write_columns(rows: list[Row], columns: tuple[str, ...], path: Path) -> None:
    """A CSV with a line per row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_columns(path: Path) -> list[Row]:
    """What `write_columns` wrote: numbers as numbers, nothing as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def write_results(
    rows: list[Row], columns: tuple[str, ...], plot: Callable[[list[Row], Path], None], stem: Path
) -> str:
    """`stem`.csv and `stem`.png, in a folder that need not exist; returns a line that says so."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    table, picture = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("csv", "png"))
    write_columns(rows, columns, table)
    plot(rows, picture)
    return f"wrote {table} and .png"


def print_rows(rows: list[Row], as_json: bool, draw: Callable[[list[Row], Console], None]) -> None:
    """On stdout: one JSON array, or what `draw` makes of them for people."""
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        draw(rows, Console(highlight=False))
