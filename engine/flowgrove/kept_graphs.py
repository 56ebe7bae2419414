"""Passes of the rollout that keep their graph, so that the first update, whose policy is still the rollout's own, need not run them again."""

import sys
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flowgrove.device import total_memory
from flowgrove.edges import edges_in_update
from flowgrove.forest import KeptPass
from flowgrove.memory import graph_bytes, predict_memory
from flowgrove.models.policy import Policy, Velocity
from flowgrove.plan import RolloutPlan, Step, make_plan
from flowgrove.recipe import Recipe
from flowgrove.sigmas import recipe_sigmas

_GPU_SHARE = 0.9  # of the device's memory: the allocator's fragments and what libraries take
_CPU_SHARE = 0.25
_LEAST_SHARE = 0.25  # smaller passes train faster packed with others, though their forward runs again


class GraphRoom(NamedTuple):
    """How many states' graphs a run may keep, and the share of the token budget that a pass must fill for it."""

    states: int
    share: float

    @classmethod
    def of(cls, recipe: Recipe, policy: Policy) -> "GraphRoom":
        """By engine.reuse_rollout_graph. `auto`: as many as by prediction fit into the device's memory, and passes of at least a quarter of the budget; none
        where the rewards decide which edges train, since most graphs would then be made for nothing."""
        engine, prune = recipe.engine, recipe.credit.prune
        if engine.reuse_rollout_graph is False or engine.exact_replay or not engine.share:
            return cls(0, 0.0)
        if engine.reuse_rollout_graph is True:
            return cls(sys.maxsize, 0.0)
        if prune is not None and prune.kind != "depth":
            return cls(0, 0.0)
        room, graph = _room_of_cpu(policy) if policy.device.type == "cpu" else _room_of_gpu(recipe, policy)
        return cls(max(0, room // graph), _LEAST_SHARE)

    def keeper(self, policy: Policy) -> "GraphKeeper | None":
        """For one iteration of `policy`."""
        full = policy.budget.rows // (2 if policy.doubles else 1)
        return GraphKeeper(self.states, max(1, int(self.share * full))) if self.states else None


def _room_of_gpu(recipe: Recipe, policy: Policy) -> tuple[int, int]:
    """(bytes for graphs beside all that a run needs, bytes of a row's graph)."""
    memory = predict_memory(recipe, make_plan(recipe, 0, recipe_sigmas(recipe)), policy.device.type)
    foreign = max(0, policy.bytes_when_loaded - memory.loaded)  # models of rewards
    return int(_GPU_SHARE * total_memory(policy.device)) - memory.peak - foreign, memory.graph


def _room_of_cpu(policy: Policy) -> tuple[int, int]:
    """The same where memory is shared with others; the model itself is asked what a row holds."""
    prompts = policy.encode([""])

    def velocity(rows: int) -> Velocity:
        x = torch.zeros(rows, *policy.adapter.latent_shape, dtype=policy.state_dtype)
        return policy.velocity(x, torch.ones(rows), prompts, torch.zeros(rows, dtype=torch.int64))

    return int(_CPU_SHARE * total_memory(policy.device)), graph_bytes(velocity)


class GraphKeeper:
    """`rows`: how many rows' graphs the device has room for. A pass of fewer than `least` rows is not kept: training packs its rows into fuller ones."""

    def __init__(self, rows: int, least: int = 1) -> None:
        self.rows, self.least = rows, least
        self.passes: list[KeptPass] = []
        self._taken = False

    def takes(self, count: int) -> bool:
        """Whether a pass of `count` rows is to keep its graph; its room is then taken."""
        if not self.least <= count <= self.rows:
            return False
        self.rows -= count
        self._taken = True
        return True

    def give_up(self) -> bool:
        """Frees every graph and keeps no more; False if there was none, not even begun."""
        held, self._taken, self.rows = self._taken, False, 0
        for kept in self.passes:
            kept.velocity = None
        return held


def first_update_states(plan: RolloutPlan, step: Step, prompts: range) -> NDArray[np.bool_]:
    """[prompts, nodes_in]: the states with an edge that the first update trains, as far as the plan can tell. `prompts`: their numbers in the iteration."""
    if not step.trained:
        return np.zeros((len(prompts), step.nodes_in), dtype=bool)
    edges = np.array([plan.kept_edges(step, prompt) for prompt in prompts]) & edges_in_update(plan, step, 0)
    return np.logical_or.reduce(edges.reshape(len(prompts), step.nodes_in, step.fanout), axis=-1)
