"""Passes of the rollout that keep their graph, so that the first update, whose policy is still the rollout's own, need not run them again."""

import sys
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowgrove.device import allocated_memory, total_memory
from flowgrove.forest import KeptPass
from flowgrove.memory import predict_memory
from flowgrove.models.policy import Policy
from flowgrove.plan import RolloutPlan, Step, make_plan
from flowgrove.recipe import Recipe
from flowgrove.sigmas import recipe_sigmas

_USABLE = 0.9  # of the device's memory: the allocator's fragments and what libraries take


class GraphRoom(NamedTuple):
    """How many rows' graphs a run may keep, and the fewest that a pass must have; (0, 0): none."""

    rows: int
    least: int

    @classmethod
    def of(cls, recipe: Recipe, policy: Policy) -> "GraphRoom":
        """By engine.reuse_rollout_graph. `auto`: as many as by prediction fit into nine tenths of the device's memory, beside all that a run needs
        there; none where the rewards decide which edges train, since most graphs would then be made for nothing."""
        engine, prune = recipe.engine, recipe.credit.prune
        if engine.reuse_rollout_graph is False or engine.exact_replay or not engine.share:
            return cls(0, 0)
        if engine.reuse_rollout_graph is True:
            return cls(sys.maxsize, 1)
        if prune is not None and prune.kind != "depth":
            return cls(0, 0)
        memory = predict_memory(recipe, make_plan(recipe, 0, recipe_sigmas(recipe)), policy.device.type)
        foreign = max(0, allocated_memory(policy.device) - memory.loaded)  # models of rewards
        room = int(_USABLE * total_memory(policy.device)) - memory.peak - foreign
        return cls(max(0, room // memory.graph), max(1, policy.budget.rows // (4 if policy.doubles else 2)))

    def keeper(self) -> "GraphKeeper | None":
        """For one iteration."""
        return GraphKeeper(self.rows, self.least) if self.rows else None


class GraphKeeper:
    """`rows`: how many rows' graphs the device has room for. A pass of fewer than `least` rows is not kept: training packs its rows into fuller ones."""

    def __init__(self, rows: int, least: int = 1) -> None:
        self.rows, self.least = rows, least
        self.passes: list[KeptPass] = []

    def takes(self, count: int) -> bool:
        """Whether a pass of `count` rows is to keep its graph; its room is then taken."""
        if not self.least <= count <= self.rows:
            return False
        self.rows -= count
        return True

    def give_up(self) -> bool:
        """Frees every graph and keeps no more; False if there was none."""
        held, self.rows = any(kept.velocity is not None for kept in self.passes), 0
        for kept in self.passes:
            kept.velocity = None
        return held


def first_update_states(plan: RolloutPlan, step: Step, prompts: range) -> NDArray[np.bool_]:
    """[prompts, nodes_in]: the states with an edge that the first update trains, as far as the plan can tell. `prompts`: their numbers in the iteration."""
    if not step.trained:
        return np.zeros((len(prompts), step.nodes_in), dtype=bool)
    first = np.array([plan.update_of_edge(step, child) == 0 for child in range(step.nodes_out)])
    edges = np.array([plan.kept_edges(step, prompt) for prompt in prompts]) & first
    return edges.reshape(len(prompts), step.nodes_in, step.fanout).any(-1)
