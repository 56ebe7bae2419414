"""What the scaling benchmark found."""

from collections.abc import Iterator

from doc_figures.registry import Rows, numbers


@numbers("docs/performance.md", "scaling_tiny_cpu.csv")
def over_leaves_and_prompts(rows: Rows) -> Iterator[tuple[str, ...]]:
    if max(row["exponent"] for row in rows) > 1:
        raise ValueError("docs/performance.md says that the cost grows no faster than leaves and prompts")
    largest = (f"{max(row[sweep] for row in rows if row['sweep'] == sweep)}" for sweep in ("leaves", "prompts"))
    yield "no faster than its leaves and prompts, up to {} and {},", *largest
