"""The scaling benchmark: the cost of an iteration over leaves and over prompts, and what the engine spends per node
outside the transformer.

Every plan is that of BranchGRPO-Mix: binary trees of 16 leaves, as many as the group has room for (a smaller group is
one smaller tree, one leaf is a lone trajectory), with four noisy steps at the start. So forwards are known exactly, and
from 16 leaves on in proportion to leaves as well as to prompts. A group of one leaf has nothing to be compared with:
its advantages are 0, the rollout runs and the update has no edge to train.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowgrove import machine
from flowgrove.bench.engine import Row, Say
from flowgrove.bench.models import bench_model
from flowgrove.bench.recipes import RECIPES, bench_prompts, bench_recipe, bench_rewards
from flowgrove.bench.scaling_fit import exponent
from flowgrove.bench.table import write_results
from flowgrove.device import pick_backend
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup
from flowgrove.spans import span_totals
from flowgrove.update.updater import Updater

COLUMNS = (
    "model", "sweep", "leaves", "prompts", "rollout_forwards", "train_passes", "forward_equivalents", "nodes",
    "seconds", "plan_s", "rollout_s", "reward_s", "credit_s", "update_s", "transformer_s", "outside_s",
    "outside_us_per_node", "exponent", "rounds", "device", "threads", "torch", "triton", "compiler", "date",
)  # fmt: skip
FORWARDS_PER_TRAIN_PASS = 3  # a backward is two matrix products for each of the forward
PROMPTS, LEAVES = 2, 16  # what a sweep over the other one holds fixed


@dataclass(frozen=True)
class Settings:
    """What is measured: `model` of bench.models, rising counts of leaves (for PROMPTS prompts) and of prompts (of
    LEAVES leaves), timed rounds.
    """

    device: torch.device
    model: str
    leaves: tuple[int, ...]
    prompts: tuple[int, ...]
    rounds: int


class Point(NamedTuple):
    """An iteration to be timed; `sweep`: the field that varies."""

    sweep: str
    leaves: int
    prompts: int


class Run(NamedTuple):
    """One timed iteration: its metrics line, and the host's seconds in the transformer, forward and backward."""

    line: dict[str, Any]
    transformer: float


def settings_of(model: str, leaves: str, prompts: str, rounds: int, device: str) -> Settings:
    """Settings from the options of the command. Raises UserError."""
    return Settings(
        machine.pick_device(device), model, _counts("--leaves", leaves), _counts("--prompts", prompts), rounds
    )


def bench_scaling(settings: Settings, say: Say, out: Path | None = None) -> list[Row]:
    """Measures everything and returns rows as COLUMNS names them; with `out`, a CSV and a plot there."""
    keep_freed_memory()
    points = [Point("leaves", leaves, PROMPTS) for leaves in settings.leaves] + [
        Point("prompts", LEAVES, prompts) for prompts in settings.prompts
    ]
    with bench_model(settings.model, settings.device) as model:
        setups = [Setup(point_recipe(model, point, settings.device)) for point in points]
        runs = _interleave(setups, points, settings, say)
    rows = [_row(point, setup, timed, settings) for point, setup, timed in zip(points, setups, runs, strict=True)]
    for sweep in ("leaves", "prompts"):
        members = [row for row in rows if row["sweep"] == sweep]
        power = exponent(members)
        for row in members:
            row["exponent"] = power
        say(
            f"{sweep}: seconds grow as forwards to the power {power:.3f} (least squares over the upper half of the "
            "points)"
        )
    if out is not None:
        from flowgrove.bench.scaling_plot import plot_scaling

        say(
            write_results(
                rows, COLUMNS, plot_scaling, out / machine.file_stem(f"scaling_{settings.model}", settings.device)
            )
        )
    return rows


def point_recipe(model: dict[str, Any], point: Point, device: torch.device) -> Recipe:
    """Trees of at most four binary splits; a group of more leaves has several of them,
    each with its own initial noise.
    """
    branch = RECIPES["branch_mix"]
    steps = branch["tree"]["splits"]
    depth = max(depth for depth in range(len(steps) + 1) if point.leaves % 2**depth == 0)
    tree = {**branch["tree"], "splits": steps[:depth]} if depth else None
    rollout = {**branch, "group_size": point.leaves, "shared_initial_noise": False, "tree": tree}
    return bench_recipe(model, point.prompts, rollout, {"device": device.type})


def _counts(option: str, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    counts = tuple(int(word) for word in words if word.isdecimal())
    if len(counts) < max(3, len(words)) or counts[0] < 1 or list(counts) != sorted(set(counts)):
        raise UserError(f"{option} is {text!r}: write at least three rising whole numbers from 1 up, like 1,2,4")
    return counts


def _interleave(setups: list[Setup], points: list[Point], settings: Settings, say: Say) -> list[list[Run]]:
    """Every point in turn, `rounds` times after one to warm up; the runs of each point."""
    first = setups[0].recipe  # the others differ in their rollouts only
    policy = Policy.load(first, settings.device)
    updater = Updater(first, policy, PassRunner.of(first, policy))
    rewards = bench_rewards(first, settings.device)
    stages = [Stages(setup, policy, updater, rewards) for setup in setups]
    runs: list[list[Run]] = [[] for _ in points]
    for number in range(settings.rounds + 1):
        for place, (setup, point) in enumerate(zip(setups, points, strict=True)):
            with pick_backend(setup.recipe), span_totals(settings.device) as totals:
                line = stages[place].run(bench_prompts(point.prompts), 0)
            if number:
                runs[place].append(
                    Run(line, totals.seconds.get("transformer", 0.0) + totals.seconds.get("backward", 0.0))
                )
        say(f"round {number} of {settings.rounds}" if number else "warm")
    return runs


def _row(point: Point, setup: Setup, runs: list[Run], settings: Settings) -> Row:
    """Counts of the point and medians of its runs. Outside: all stages but the reward, less the transformer."""
    plan, line = setup.first_plan, runs[-1].line
    nodes = (plan.roots + plan.counts.edges) * point.prompts
    outside = statistics.median(
        sum(run.line["seconds"].values()) - run.line["seconds"]["reward"] - run.transformer for run in runs
    )
    return {
        "model": settings.model,
        **point._asdict(),
        "rollout_forwards": line["rollout_forwards"],
        "train_passes": line["train_passes"],
        "forward_equivalents": line["rollout_forwards"] + FORWARDS_PER_TRAIN_PASS * line["train_passes"],
        "nodes": nodes,
        "seconds": statistics.median(sum(run.line["seconds"].values()) for run in runs),
        **{f"{stage}_s": statistics.median(run.line["seconds"][stage] for run in runs) for stage in line["seconds"]},
        "transformer_s": statistics.median(run.transformer for run in runs),
        "outside_s": outside,
        "outside_us_per_node": 1e6 * outside / nodes,
        "rounds": settings.rounds,
        **machine.describe(settings.device),
    }
