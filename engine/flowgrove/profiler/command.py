"""`flowgrove profile`: measures, and puts together what was measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowgrove.bench.table import write_columns
from flowgrove.device import pick_backend, total_memory
from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.machine import describe, free_memory
from flowgrove.models.runner import PassRunner
from flowgrove.plan.flops import count_flops
from flowgrove.plan.memory import GPU_SHARE
from flowgrove.profiler.advice import SHOWN, Suggestion, suggestions
from flowgrove.profiler.events import Trace
from flowgrove.profiler.facts import Facts
from flowgrove.profiler.gaps import Idle, idle
from flowgrove.profiler.memory import Timeline, held, timeline
from flowgrove.profiler.rates import ceilings
from flowgrove.profiler.session import Session
from flowgrove.profiler.table import COLUMNS, Measured, Row, phase_table, utilisation
from flowgrove.profiler.work import Cost, flops_of
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup

_HEAVIEST = 6  # kernels, or ops, that are named
Say = Callable[[str], None]


@dataclass(frozen=True)
class Profile:
    """Of a recipe on this machine: per iteration `seconds`, and `rows` of the table of phases; of the profiled ones
    `profiled_seconds`, the `heaviest` kernels or ops by name in seconds, `idle` (None on a CPU) and `memory`.
    `allocator_peak`: what a GPU's allocator itself says. `matrix_rate` of `dtype` in FLOP/s and `copy_rate` in bytes
    per second are the device's.
    """

    recipe: str
    out: Path
    machine: dict[str, str | int]
    on_gpu: bool
    iterations: int
    warm_up: int
    seconds: float
    profiled_seconds: float
    rows: list[Row]
    dtype: str
    matrix_rate: float | None
    copy_rate: float | None
    utilisation: float | None
    budget: int
    heaviest: dict[str, float]
    idle: Idle | None
    memory: Timeline
    allocator_peak: int | None
    suggestions: list[Suggestion]

    @property
    def files(self) -> dict[str, Path]:
        """What is written beside the terminal."""
        names = {"phases": "phases.csv", "trace": "trace.json.gz", "memory": "memory.csv", "plot": "memory.png"}
        return {name: self.out / file for name, file in {**names, "profile": "profile.json"}.items()}

    def as_json(self) -> dict[str, Any]:
        """One object; seconds, bytes, FLOP/s, and microseconds in `idle`."""
        memory = self.memory
        return {
            "recipe": self.recipe, **self.machine, "iterations": self.iterations, "warm_up": self.warm_up,
            "seconds": self.seconds, "profiled_seconds": self.profiled_seconds, "phases": self.rows,
            "dtype": self.dtype, "matrix_flop_per_s": self.matrix_rate, "copy_bytes_per_s": self.copy_rate,
            "utilisation": self.utilisation, "token_budget": self.budget, "heaviest": self.heaviest,
            "memory": {
                "peak": memory.peak, "told": memory.told, "allocator": self.allocator_peak,
                "at_peak": memory.at_peak, "peaks": memory.peaks,
            },
            "idle": None if self.idle is None else asdict(self.idle),
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "files": {name: str(path) for name, path in self.files.items()},
        }  # fmt: skip


def profile_recipe(name: str, setup: Setup, out: Path, iterations: int, warm_up: int, say: Say) -> Profile:
    """Runs the recipe called `name` for some iterations from its first one on, as often as it takes to count the bytes
    of its ops, to warm up, to take its time and to trace it, and writes the files into `out`. No run folder is touched.

    Raises UserError as `flowgrove train` does, and for a folder that holds a run.
    """
    if (out / "checkpoints").exists():
        raise UserError(f"{out} holds a run: give another folder with --out")
    recipe, session = setup.recipe, Session(setup, max(iterations, warm_up), PassRunner)
    out.mkdir(parents=True, exist_ok=True)
    with pick_backend(recipe):
        say("counting the bytes of ops")
        bytes_of = session.counted(iterations)
        if warm_up:
            say("warming up")
            session.run(warm_up)
        say("timing")
        whole, spent = session.timed(iterations)
        say("profiling")
        trace_file = out / "trace.json.gz"
        base: dict[str, int] = {}
        allocator = session.traced(iterations, trace_file, lambda: base.update(held(session.policy, session.updater)))
    trace = Trace.read(trace_file)
    rates = ceilings(session.device, recipe.model.dtype)
    cost = Cost.of(count_flops(recipe), recipe.data.prompts_per_iteration)
    measured = Measured(
        spent, whole / iterations, iterations, flops_of(spent, cost, session.plan), bytes_of,
        trace.launches(), trace.waits(),
    )  # fmt: skip
    rows = phase_table(measured, rates.matrix, rates.copied)
    used = utilisation(rows, rates.matrix)
    gaps = idle(trace.busy) if trace.on_gpu else None
    facts = Facts(
        setup, session.device.type, measured.seconds, measured.phases(), session.runner.budget.tokens,
        session.policy.doubles, gaps, used, partial(_fits, session),
    )  # fmt: skip
    memory = timeline(trace, base, {row["phase"]: row["kind"] for row in rows}, session.device)
    found = Profile(
        recipe=name,
        out=out,
        machine=describe(session.device),
        on_gpu=trace.on_gpu,
        iterations=iterations,
        warm_up=warm_up,
        seconds=measured.seconds,
        profiled_seconds=trace.seconds / iterations,
        rows=rows,
        dtype=recipe.model.dtype,
        matrix_rate=rates.matrix,
        copy_rate=rates.copied,
        utilisation=used,
        budget=session.runner.budget.tokens,
        heaviest={work: spent / 1e6 / iterations for work, spent in trace.heaviest().most_common(_HEAVIEST)},
        idle=gaps,
        memory=memory,
        allocator_peak=allocator,
        suggestions=suggestions(facts)[:SHOWN],
    )
    _write(found, trace)
    return found


def _fits(session: Session[PassRunner], recipe: Recipe) -> bool:
    """Whether another recipe with the same passes fits by prediction: on a GPU beside models of rewards, on a CPU into
    the memory that is free now.
    """
    policy, tokens = session.policy, session.runner.budget.tokens
    try:
        needed = Setup(recipe).memory(session.device.type).at(tokens)
    except UserError:
        return False
    if session.device.type == "cuda":
        foreign = max(0, policy.bytes_when_loaded - needed.loaded)
        return needed.peak + foreign <= GPU_SHARE * total_memory(session.device)
    free = free_memory(session.device)
    return free is not None and needed.peak <= free


def _write(found: Profile, trace: Trace) -> None:
    from flowgrove.profiler.memory_plot import plot_memory

    files = found.files
    write_columns(found.rows, COLUMNS, files["phases"])
    found.memory.write(files["memory"])
    write_text(files["profile"], json.dumps(found.as_json(), indent=1) + "\n")
    title = f"memory of {found.recipe} on {found.machine['device']}"
    plot_memory(found.memory, trace.stages(found.memory.origin), title, files["plot"])
