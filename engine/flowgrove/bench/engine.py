"""The engine benchmark: an iteration of the published loop, and of Flowgrove with each lever added in turn, in one interleaved run.

The published loop runs every trajectory and every edge as a batch of one, with the step, log-probability and loss in eager PyTorch. Beside the seconds
stands what the counted passes should take at the time of a row, measured alone or in full passes right before, so that a lever that saves less than its
passes shows.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowgrove.allocator import keep_freed_memory
from flowgrove.bench import machine
from flowgrove.bench.models import bench_model
from flowgrove.bench.table import write_results
from flowgrove.cuda_graphs import CudaGraphs
from flowgrove.device import pick_backend
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy, tokens_per_pass
from flowgrove.pass_times import Passes, Timed
from flowgrove.recipe import Recipe, parse_recipe
from flowgrove.rewards.registry import Rewards
from flowgrove.spans import span_totals
from flowgrove.update import Updater

COLUMNS = (
    "model", "recipe", "prompts", "lever", "rollout_forwards", "train_passes", "seconds", "plan_s", "rollout_s", "reward_s", "credit_s", "update_s",
    "transformer_s", "decode_s", "percent_outside", "predicted_s", "samples_per_second", "peak_memory_bytes", "speedup", "predicted_speedup", "rounds",
    "device", "threads", "torch", "triton", "compiler", "date",
)  # fmt: skip

_TREE = {"splits": [0, 3, 6, 9], "fanout": 2}
_DANCE = {"dynamics": "dance_sde", "noise_level": 0.3}
_WINDOW = {"strategy": "progressive", "size": 4, "start": 0}
_FLASH = {"tail": {"compress": 0.4}}
RECIPES: dict[str, dict[str, Any]] = {  # 20 steps and 16 leaves, as BranchGRPO compares them
    "dance": {**_DANCE, "window": {"strategy": "all"}},
    "mix": {"window": _WINDOW},
    "mix_flash": {"window": _WINDOW, **_FLASH},
    "branch": {**_DANCE, "tree": _TREE, "window": {"strategy": "all"}},
    "branch_mix": {**_DANCE, "tree": _TREE, "window": _WINDOW},
    "branch_mix_flash": {**_DANCE, "tree": _TREE, "window": _WINDOW, **_FLASH},
}


class Lever(NamedTuple):
    """What is switched on besides the levers before it, as the whole `engine` section of the recipe."""

    name: str
    engine: dict[str, Any]


REUSED = Lever("+ reused graphs", {})
LEVERS = (
    Lever("published loop", {"share": False, "token_budget": 1, "backend": "reference"}),
    Lever("+ fused ops", {"share": False, "token_budget": 1}),
    Lever("+ full batches", {"share": False}),
    Lever("+ shared states", {"reuse_rollout_graph": False}),
    REUSED,
)
GRAPHS = Lever("+ CUDA graphs", {"cuda_graphs": True})
COMPILED = Lever("+ compiled blocks", {"compile": True})

_REPEATS = 3  # of a pass whose rows are timed
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured: `model` of bench.models, recipes by name, iterations timed of each; `compiled`: the lever that takes minutes to warm up too."""

    device: torch.device
    model: str
    recipes: tuple[str, ...]
    prompts: int
    rounds: int
    compiled: bool = False

    @property
    def levers(self) -> tuple[Lever, ...]:
        """On a GPU with CUDA graphs; the compiled blocks without them."""
        return (*LEVERS, *([GRAPHS] if self.device.type == "cuda" else []), *([COMPILED] if self.compiled else []))


def bench_engine(settings: Settings, say: Say, out: Path | None = None) -> list[Row]:
    """Measures everything and returns rows as COLUMNS names them; with `out`, a CSV and a bar chart there."""
    for name in settings.recipes:
        if name not in RECIPES:
            raise UserError(f"--recipes names {name}: write some of {', '.join(RECIPES)}")
    keep_freed_memory()
    rows: list[Row] = []
    with bench_model(settings.model, settings.device) as model:
        policy = Policy(_recipe(model, settings, settings.recipes[0], COMPILED if settings.compiled else REUSED), settings.device)
        for name in settings.recipes:
            rows += _measure(model, policy, settings, name, say)
    if out is not None:
        from flowgrove.bench.engine_plot import plot_engine

        say(write_results(rows, COLUMNS, plot_engine, out / machine.file_stem(f"engine_{settings.model}", settings.device)))
    return rows


def _recipe(model: dict[str, Any], settings: Settings, name: str, lever: Lever) -> Recipe:
    return bench_recipe(model, settings.prompts, {"group_size": 16, **RECIPES[name]}, {"device": settings.device.type, **lever.engine})


def bench_recipe(model: dict[str, Any], prompts: int, rollout: dict[str, Any], engine: dict[str, Any]) -> Recipe:
    """20 steps and one update per iteration, with the sections `model` and `engine` and the rest of `rollout` as given. Raises UserError."""
    return parse_recipe({
        "model": model,
        "data": {"prompts": "unused.txt", "prompts_per_iteration": prompts, "embedding_cache": "none"},
        "rollout": {"steps": 20, "shift": 3.0, **rollout},
        "reward": [{"name": "jpeg_size"}],
        "update": {"lr": 1e-6, "clip_range": 1e-3, "updates_per_iteration": 1},
        "engine": engine,
    })  # fmt: skip


def bench_prompts(count: int) -> list[str]:
    return [f"a picture number {number}" for number in range(count)]


def _stance(compiled: bool) -> AbstractContextManager[None]:
    """One policy serves all levers: where it has compiled blocks, those run uncompiled in here unless they are wanted."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("default" if compiled else "force_eager")
    return stance


def _measure(model: dict[str, Any], policy: Policy, settings: Settings, name: str, say: Say) -> list[Row]:
    """The levers of one recipe, in turn, `rounds` times after one round to warm up the batched ones; each beside the time of a row in its kind of pass."""
    levers, rewards = settings.levers, Rewards(_recipe(model, settings, name, LEVERS[0]), settings.device)
    recipes = [_recipe(model, settings, name, lever) for lever in levers]
    stages = [Stages(recipe, policy, Updater(recipe, policy), rewards) for recipe in recipes]
    first = levers.index(REUSED)
    for stage in stages[first + 1 :]:
        stage.room = stages[first].room  # the levers after it change nothing in the memory that it is predicted from
    graphs, passes = CudaGraphs(settings.device), Passes(policy)
    found: list[list[Row]] = [[] for _ in levers]
    for number in range(settings.rounds + 1):
        for place, (recipe, lever) in enumerate(zip(recipes, levers, strict=True)):
            if number == 0 and recipe.engine.token_budget == 1:
                continue
            policy.budget.tokens = tokens_per_pass(recipe, settings.device.type)
            policy.graphs = graphs if recipe.engine.cuda_graphs else None
            if settings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(settings.device)
            with pick_backend(recipe), _stance(recipe.engine.compile):
                per_row = passes.timed(policy.budget.rows, _REPEATS)
                passes.release()
                with span_totals(settings.device) as totals:
                    line = stages[place].run(bench_prompts(settings.prompts), 0)
            if number:
                found[place].append(_row(line, lever.name, totals.seconds, per_row))
        say(f"{name}: round {number} of {settings.rounds}" if number else f"{name}: warm")
    rows = [_median(rounds) for rounds in found]
    where = {"model": settings.model, "recipe": name, "prompts": settings.prompts, "rounds": settings.rounds, **machine.describe(settings.device)}
    for row in rows:
        row |= {"speedup": rows[0]["seconds"] / row["seconds"], "predicted_speedup": rows[0]["predicted_s"] / row["predicted_s"], **where}
    return rows


def _row(line: dict[str, Any], lever: str, totals: dict[str, float], per_row: Timed) -> Row:
    seconds = sum(line["seconds"].values())
    transformer = totals.get("transformer", 0.0) + totals.get("backward", 0.0)
    return {
        "lever": lever,
        "rollout_forwards": line["rollout_forwards"],
        "train_passes": line["train_passes"],
        "seconds": seconds,
        **{f"{stage}_s": spent for stage, spent in line["seconds"].items()},
        "transformer_s": transformer,
        "decode_s": totals.get("decode", 0.0),
        "percent_outside": 100 * (1 - transformer / seconds),
        "predicted_s": line["rollout_forwards"] * per_row.forward + line["train_passes"] * per_row.train,
        "samples_per_second": line["samples_per_second"],
        "peak_memory_bytes": line["peak_memory_bytes"],
    }


def _median(rounds: list[Row]) -> Row:
    return {key: value if isinstance(value, str) else statistics.median(row[key] for row in rounds) for key, value in rounds[0].items()}
