"""Passes of the rollout that keep their graph, so that the first update, whose policy is still the rollout's own, need not run them again."""

import numpy as np
from numpy.typing import NDArray

from flowgrove.forest import KeptPass
from flowgrove.plan import RolloutPlan, Step


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
