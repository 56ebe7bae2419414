"""Passes of the rollout that retain their graph, so that the first update, whose policy is still the rollout's own,
need not run them again.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.rollout.forest import RetainedPass, edges_in_update


class RetainedGraphs:
    """`rows`: how many rows' graphs the device has room for. A pass of fewer than `least` rows is not retained:
    training packs its rows into fuller ones.
    """

    def __init__(self, rows: int, least: int = 1) -> None:
        self.rows, self.least = rows, least
        self.passes: list[RetainedPass] = []
        self._taken = False

    def takes(self, count: int) -> bool:
        """Whether a pass of `count` rows is to retain its graph; its room is then taken."""
        if not self.least <= count <= self.rows:
            return False
        self.rows -= count
        self._taken = True
        return True

    def give_up(self) -> bool:
        """Frees every graph and retains no more; False if there was none, not even begun."""
        held, self._taken, self.rows = self._taken, False, 0
        for one in self.passes:
            one.velocity = None
        return held


def first_update_states(plan: RolloutPlan, step: Step, prompts: range) -> NDArray[np.bool_]:
    """[prompts, nodes_in]: the states with an edge that the first update trains, as far as the plan can tell.
    `prompts`: their numbers in the iteration.
    """
    return _states(plan, step, prompts, 0, None)


def states_in_update(plan: RolloutPlan, step: Step, prompts: range, update: int) -> NDArray[np.bool_]:
    """The same of any update, with stand-ins for the leaves that pruning by reward keeps, as a plan counts them."""
    return _states(plan, step, prompts, update, plan.countable_leaves)


def _states(
    plan: RolloutPlan, step: Step, prompts: range, update: int, kept_leaf: Callable[[int], bool] | None
) -> NDArray[np.bool_]:
    if not step.trained:
        return np.zeros((len(prompts), step.nodes_in), dtype=bool)
    edges = np.array([plan.kept_edges(step, prompt, kept_leaf) for prompt in prompts])
    edges &= edges_in_update(plan, step, update)
    return np.logical_or.reduce(edges.reshape(len(prompts), step.nodes_in, step.fanout), axis=-1)
