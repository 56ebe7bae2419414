"""The op benchmark as a table on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

_HEADINGS = ("contender", "µs", "q10", "q90", "% copy", "× eager", "launches", "MiB")  # 80 columns hold no more; the CSV has the rest


def draw_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """One table per case, shape and dtype: medians and quantiles, the share of the copy bandwidth, memory beyond the outputs."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        title = f"{row['op']}, {row['case']}, {row['shape']} ({row['rows']} × {row['elements']:,}), {row['dtype']}; copy {row['copy_gb_per_s']:.1f} GB/s"
        groups.setdefault(title, []).append(row)
    for title, members in groups.items():
        table = Table(box=None, pad_edge=False, collapse_padding=True)
        for heading in _HEADINGS:
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
            )
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
        console.print()
