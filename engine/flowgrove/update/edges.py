"""Which edges an optimiser update trains, as rows: every distinct (state, step) once,
with all its children that the update trains. Host arrays.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowgrove.credit import EdgeCredit
from flowgrove.passes.packing import Ints
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.rollout.forest import Forest, edges_in_update


class UpdateSize(NamedTuple):
    """What an update trains of all prompts of the iteration, on whichever rank. `selected`: edges that plan and pruning
    give it, N_u, whether they have an advantage or not; `trains`: whether any of them has one, or a KL term.
    """

    selected: int
    trains: bool


def update_sizes(plan: RolloutPlan, credit: dict[int, EdgeCredit], keep_zero_advantage: bool) -> list[UpdateSize]:
    """The size of every update, from the credit of all prompts."""
    sizes = []
    for update in range(plan.updates):
        masks = [
            (credit[step.index].trains & edges_in_update(plan, step, update), credit[step.index].advantage)
            for step in plan.trained_steps
        ]
        selected = sum(int(mask.sum()) for mask, _ in masks)
        trains = any(bool((mask & (keep_zero_advantage | (advantage != 0))).any()) for mask, advantage in masks)
        sizes.append(UpdateSize(selected, trains))
    return sizes


@dataclass(frozen=True)
class Edges:
    """Rows: state (row of the forest), step, prompt, children; edges, in the order of their rows: child (row of the
    forest), node and its parent (in their levels), advantage, weight ω of the step.
    """

    state: Ints
    step: Ints
    prompt: Ints
    children: Ints
    child: Ints
    node: Ints
    parent: Ints
    advantage: NDArray[np.float64]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.state)

    def take(self, rows: Ints) -> "Edges":
        """These rows in this order, with their edges."""
        first = np.cumsum(self.children) - self.children
        children = self.children[rows]
        edges = np.repeat(first[rows] - (np.cumsum(children) - children), children) + np.arange(children.sum())
        return Edges(
            self.state[rows], self.step[rows], self.prompt[rows], children,
            self.child[edges], self.node[edges], self.parent[edges], self.advantage[edges], self.weight[edges],
        )  # fmt: skip


def edges_of_update(
    forest: Forest,
    credit: dict[int, EdgeCredit],
    update: int,
    step_weight: dict[int, float],
    keep_zero_advantage: bool,
    granularity: str = "states",
) -> Edges:
    """The edges that `update` trains. Those without advantage are left out unless a KL term needs them.

    granularity: "states": a row for each state that has such an edge; "levels": for each state of a trained level;
    "edges": for each edge.
    """
    plan, parts = forest.plan, []
    for step in plan.trained_steps:
        mine = credit[step.index].trains & edges_in_update(plan, step, update)
        advantage = credit[step.index].advantage
        parts.append(
            rows_of_step(
                forest,
                step,
                mine if keep_zero_advantage else mine & (advantage != 0),
                advantage,
                step_weight[step.index],
                granularity,
            )
        )
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Edges(*map(np.concatenate, columns))


def rows_of_step(
    forest: Forest, step: Step, mask: NDArray[np.bool_], advantage: NDArray[np.float64], weight: float, granularity: str
) -> Edges:
    """The edges of a step in `mask` [prompts, nodes_out], with the `advantage` of each and the step's weight ω."""
    prompt, node = np.nonzero(mask)  # edges in (prompt, node) order: siblings contiguous
    parent = prompt * step.nodes_in + node // step.fanout  # row in the level
    if granularity == "edges":
        state, children = parent, np.ones_like(parent)
    else:
        children = np.bincount(parent, minlength=forest.prompts * step.nodes_in)
        state = np.arange(len(children)) if granularity == "levels" else np.flatnonzero(children)
        children = children[state]
    child = forest.first_row[step.index + 1] + prompt * step.nodes_out + node
    return Edges(
        forest.first_row[step.index] + state, np.full(len(state), step.index), state // step.nodes_in, children,
        child, node, node // step.fanout, advantage[prompt, node], np.full(len(child), weight),
    )  # fmt: skip
