"""What profiling/span_cost.py found."""

from collections.abc import Iterator

from doc_figures.registry import Rows, numbers, only, version

CPU = "span_cost_cpu.csv"


@numbers("docs/profiling.md", CPU)
def ranges(rows: Rows) -> Iterator[tuple[str, ...]]:
    row = only(rows, model="tiny")
    yield (
        "an iteration of the tiny pipeline has {} ranges and takes {} ms on two cores (torch {})",
        f"{row['ranges']}", f"{row['without_ms']:.0f}", version(row["torch"]),
    )  # fmt: skip
    low, high = (f"{row[f'percent_{end}']:.1f}".replace("-", "−") for end in ("low", "high"))
    pairs = f"{row['pairs']}"
    yield "the 95 % interval of what ranges add is {} to {} % of it, over {} interleaved pairs", low, high, pairs
