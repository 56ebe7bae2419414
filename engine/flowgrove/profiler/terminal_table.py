"""A table of phases on the terminal, of a profile and of a capture."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table


def draw_phases(
    rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, str]], headings: Iterable[str]
) -> Table:
    """`cells` of every row by heading; headings under which nothing stands are left out. Dim: rows that are `beside`
    the others.
    """
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    shown = [heading for heading in headings if any(cell[heading] for cell in cells)]
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    for row, cell in zip(rows, cells, strict=True):
        table.add_row(*(cell[heading] for heading in shown), style="dim" if row["beside"] else None)
    return table
