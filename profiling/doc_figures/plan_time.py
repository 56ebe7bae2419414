"""What `flowgrove plan --time` predicts, and how far its predictions were from iterations that profiling/plan_error.py
has measured.

plan_time.csv keeps the prediction of one shipped recipe, since it takes half a minute:
`python profiling/make_figures.py --predictions` remakes it, and a test of `make test-long` predicts anew.
"""

from collections.abc import Iterator
from pathlib import Path

from doc_figures.plan_memory import Planned
from doc_figures.registry import FOLDER, ROOT, Rows, block, numbers, only, table, version
from flowgrove.bench.table import write_columns
from flowgrove.cost.run_time import predict_time
from flowgrove.plan.division import ALONE
from flowgrove.rates.published import UTILISATION
from flowgrove.setup import Setup

TIME, ERROR = "plan_time.csv", "plan_error_cpu.csv"
_COLUMNS = ("recipe", "device", "utilisation", "iterations", "of", "seconds")
_RECIPE, _DEVICE = Planned("mix_flux"), "h100"
_ITERATION, _RUN = "iteration", "run"
_STAGES = ("plan", "rollout", "reward", "update", "iteration")


def predicted() -> Rows:
    """The rows of plan_time.csv."""
    setup = Setup(_RECIPE.load())
    found = predict_time(setup, ALONE, _DEVICE)
    stages = {stage: seconds for stage, seconds in found.iteration.seconds.items() if seconds is not None}
    of = {**stages, _ITERATION: found.iteration.total, _RUN: found.seconds}
    where = {
        "recipe": _RECIPE.recipe, "device": found.device, "utilisation": UTILISATION,
        "iterations": setup.recipe.run.iterations,
    }  # fmt: skip
    return [{**where, "of": name, "seconds": float(f"{seconds:.4g}")} for name, seconds in of.items()]


def write_time(root: Path = ROOT) -> None:
    """Predicts and writes the CSV."""
    write_columns(predicted(), _COLUMNS, root / FOLDER / TIME)


@block("docs/runs.md", ERROR)
def plan_error(rows: Rows) -> str:
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        stages = [only(rows, recipe=name, stage=stage) for stage in _STAGES]
        whole = stages[-1]
        seconds = f"{whole['predicted_s']:.2f}", f"{whole['measured_s']:.2f}"
        lines.append((f"`{name}`", *seconds, *(_percent(row["error"]) for row in (whole, *stages[:-1]))))
    heads = ("", "predicted, s", "measured, s", "difference", *(f"of {stage}" for stage in _STAGES[:-1]))
    return table(heads, lines)


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %".replace("-", "−")


@numbers("docs/runs.md", ERROR, TIME)
def runs(error: Rows, time: Rows) -> Iterator[tuple[str, ...]]:
    first = error[0]
    yield "On two x86-64 cores (torch {}), medians of {} iterations", version(first["torch"]), f"{first['iterations']}"
    of = {row["of"]: row["seconds"] for row in time}
    yield (
        "on one H100 at {} % of its peak takes {} minutes an iteration (rollout {}, update {}, decoding {} s)",
        f"{100 * time[0]['utilisation']:.0f}",
        *(f"{of[name] / 60:.1f}" for name in (_ITERATION, "rollout", "update")),
        f"{of['decode']:.1f}",
    )  # fmt: skip
    yield "and {} hours for its {} iterations", f"{of[_RUN] / 3600:.0f}", f"{time[0]['iterations']}"
