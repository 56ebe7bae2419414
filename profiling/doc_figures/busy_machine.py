"""What profiling/busy_machine.py found."""

from doc_figures.registry import Rows, block, only, table

_WAYS = ("GNU's default", "GOMP_SPINCOUNT=10000", "OMP_WAIT_POLICY=passive")
_SET = "GOMP_SPINCOUNT=10000"  # by flowgrove, where the environment says nothing


@block("docs/performance.md", "busy_machine.csv")
def busy_machine(rows: Rows) -> str:
    """Bold is what flowgrove sets. Beside other programs fewer iterations were timed, and a digit less is told."""
    lines = []
    for count in sorted({row["busy_programs"] for row in rows}):
        seconds = [only(rows, busy_programs=count, waiting=way)["median_s"] for way in _WAYS]
        cells = [f"{value:.{1 if count else 2}f}" for value in seconds]
        bold = (f"**{cell}**" if way == _SET else cell for way, cell in zip(_WAYS, cells, strict=True))
        lines.append(({0: "nothing", 1: "1 busy program"}.get(count, str(count)), *bold))
    return table(("beside", *(way if " " in way or "'" in way else f"`{way}`" for way in _WAYS)), lines)
