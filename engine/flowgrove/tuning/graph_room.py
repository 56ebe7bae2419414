"""How many passes of the rollout may retain their graph for the first update:
what the device's memory has room for beside all that a run needs.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from flowgrove.device import total_memory
from flowgrove.models.compiling import eager_blocks
from flowgrove.models.policy import Policy, Velocity
from flowgrove.models.runner import PassRunner
from flowgrove.plan.allocations import graph_bytes
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.memory import GPU_SHARE
from flowgrove.process import started_here
from flowgrove.recipe.schema import Recipe
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.setup import Setup

_CPU_SHARE = 0.25  # of the machine's, for all ranks that run on it
_LEAST_SHARE = 0.25  # smaller passes train faster packed with others, though their forward runs again


class GraphRoom(NamedTuple):
    """How many states' graphs a run may retain, and the share of the token budget that a pass must fill for it."""

    states: int
    share: float

    @classmethod
    def of(cls, setup: Setup, policy: Policy, runner: PassRunner, division: Division = ALONE) -> "GraphRoom":
        """The room that engine.reuse_rollout_graph gives. `auto`: as many as by prediction fit into the device's
        memory, and passes of at least a quarter of the budget; none where the rewards decide which edges train, since
        most graphs would then be made for nothing, and none where ranks have divided the weights: kept passes would
        gather them in another order.
        """

        def fitting() -> int:
            on_cpu = policy.device.type == "cpu"
            room, graph = _room_of_cpu(policy, runner) if on_cpu else _room_of_gpu(setup, policy, runner, division)
            return room // graph

        return cls.asked(setup.recipe, bool(policy.weights.sharded), fitting)

    @classmethod
    def asked(cls, recipe: Recipe, divided: bool, fitting: Callable[[], int]) -> "GraphRoom":
        """The same with what decides it: whether weights are divided, and how many states' graphs fit, which is asked
        where it matters.
        """
        engine, prune = recipe.engine, recipe.credit.prune
        if engine.reuse_rollout_graph is False or engine.exact_replay or not engine.share or divided:
            return NO_ROOM
        if recipe.model.gradient_checkpointing == "offload":  # a graph is small, and what it needs of the host is not
            return NO_ROOM
        if engine.reuse_rollout_graph is True:
            return cls(sys.maxsize, 0.0)
        if prune is not None and prune.kind != "depth":
            return NO_ROOM
        return cls(max(0, fitting()), _LEAST_SHARE)

    def retained_graphs(self, policy: Policy, runner: PassRunner) -> "RetainedGraphs | None":
        """What retains the graphs of one iteration of `policy`; None where none is retained."""
        return self.graphs(runner.budget.rows // (2 if policy.doubles else 1))

    def graphs(self, full: int) -> "RetainedGraphs | None":
        """The same by the states of a full pass."""
        return RetainedGraphs(self.states, max(1, int(self.share * full))) if self.states else None


NO_ROOM = GraphRoom(0, 0.0)


def _room_of_gpu(setup: Setup, policy: Policy, runner: PassRunner, division: Division) -> tuple[int, int]:
    """(bytes for graphs beside all that a run needs with the runner's token budget, bytes of a row's graph)."""
    memory = setup.memory(policy.device.type, division).at(runner.budget.tokens)
    foreign = max(0, policy.bytes_when_loaded - memory.loaded)  # models of rewards
    return int(GPU_SHARE * total_memory(policy.device)) - memory.peak - foreign, memory.graph


def _room_of_cpu(policy: Policy, runner: PassRunner) -> tuple[int, int]:
    """The same where memory is shared with others; the model itself is asked what a row holds."""
    prompts = policy.blank_prompt()

    def velocity(rows: int) -> Velocity:
        x = torch.zeros(rows, *policy.adapter.latent_shape, dtype=policy.state_dtype)
        first = np.zeros(rows, dtype=np.int64)
        return runner.velocity(policy, x, torch.ones(rows), prompts, torch.from_numpy(first), first)

    with eager_blocks(policy.transformer):
        return room_of_cpu(total_memory(policy.device), started_here()), graph_bytes(velocity)


def room_of_cpu(memory: int, ranks: int) -> int:
    """Bytes for graphs in a machine's memory, on which so many ranks run."""
    return int(_CPU_SHARE * memory) // ranks
