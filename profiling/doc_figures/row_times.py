"""What `flowgrove bench rows` found of a slim FLUX."""

from collections.abc import Iterator

from doc_figures.registry import Rows, block, numbers, only, table

FLUX = "rows_flux_slim_nvidia_h200.csv"
_MODES = (("eager", "eager", "forward_ms"), ("recorded as a CUDA graph", "recorded", "forward_ms"),
          ("`rollout.precision: fp8`, recorded", "fp8+recorded", "forward_ms"),
          ("eager, forward and backward", "eager", "train_ms"))  # fmt: skip


def _milliseconds(rows: Rows, mode: str, key: str, count: int) -> str:
    return f"{only(rows, mode=mode, rows=count, derived='False')[key]:.1f}"


@block("docs/performance.md", FLUX)
def milliseconds_of_a_row(rows: Rows) -> str:
    counts = sorted({row["rows"] for row in rows})
    return table(
        ("rows a pass", *map(str, counts)),
        ((name, *(_milliseconds(rows, mode, key, count) for count in counts)) for name, mode, key in _MODES),
    )


@numbers("docs/performance.md", FLUX)
def cost_of_a_row(rows: Rows) -> Iterator[tuple[str, ...]]:
    alone, eight = (only(rows, mode="eager", rows=count, derived="False")["forward_ms"] for count in (1, 8))
    yield "a row is {} × as cheap at 8 rows as at one", f"{alone / eight:.1f}"
    told = (_milliseconds(rows, mode, "forward_ms", count) for count in (1, 8) for mode in ("eager", "recorded"))
    yield "{} → {} ms at one row, {} → {} at eight", *told
    full, rounded = (
        only(rows, mode=mode, rows=8, derived="False")["forward_ms"] for mode in ("recorded", "fp8+recorded")
    )
    yield "× {} at eight rows", f"{full / rounded:.2f}"
