"""Which rows an optimiser update runs through the model: every distinct trained (state, step) once, with all its children that the update trains."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrove.credit import EdgeCredit
from flowgrove.forest import Forest
from flowgrove.models.policy import Policy
from flowgrove.plan import RolloutPlan, Step
from flowgrove_kernels import StepCoefficients

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Edges:
    """Host arrays of one update. Rows: state (row of the forest), step, prompt, children; edges, in the order of their rows: child (row of the forest),
    node and its parent (in their levels), advantage, weight."""

    state: Ints
    step: Ints
    prompt: Ints
    children: Ints
    child: Ints
    node: Ints
    parent: Ints
    advantage: NDArray[np.float64]
    weight: NDArray[np.float64]
    selected: int  # edges that plan and pruning train, those without advantage included: N_u

    def __len__(self) -> int:
        return len(self.state)


@dataclass(frozen=True)
class MicroBatch:
    """Device tensors of one pass: B rows with E children between them."""

    state: Tensor
    prompt: Tensor
    child: Tensor
    node: Tensor
    parent: Tensor
    child_prompt: Tensor
    child_step: Tensor
    offsets: Tensor  # int64 [B + 1]
    advantage: Tensor
    weight: Tensor
    sigma: Tensor
    coef: StepCoefficients


def edges_of_update(
    forest: Forest, credit: dict[int, EdgeCredit], update: int, step_weight: dict[int, float], keep_zero_advantage: bool, packing: str = "states"
) -> Edges:
    """The edges that `update` trains, weighted ω(step)/N_u. Edges without advantage are left out unless a KL term needs them.

    packing: "states" runs each state once for all its children; "levels" runs whole levels, as the rollout did; "edges" a row for each edge.
    """
    plan, parts, selected = forest.plan, [], 0
    for step in plan.trained_steps:
        mine = credit[step.index].trains & _edges_in_update(plan, step, update)
        selected += int(mine.sum())
        advantage = credit[step.index].advantage
        parts.append(_rows_of_step(forest, step, mine if keep_zero_advantage else mine & (advantage != 0), advantage, step_weight[step.index], packing))
    state, index, prompt, children, child, node, parent, advantages, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Edges(state, index, prompt, children, child, node, parent, advantages, weights / max(selected, 1), selected)


def _edges_in_update(plan: RolloutPlan, step: Step, update: int) -> NDArray[np.bool_]:
    return np.array([plan.update_of_edge(step, child) == update for child in range(step.nodes_out)])


def _rows_of_step(forest: Forest, step: Step, mask: NDArray[np.bool_], advantage: NDArray[np.float64], weight: float, packing: str) -> tuple[NDArray, ...]:
    prompt, node = np.nonzero(mask)  # edges in (prompt, node) order: siblings contiguous
    parent = prompt * step.nodes_in + node // step.fanout  # row in the level
    if packing == "edges":
        state, children = parent, np.ones_like(parent)
    else:
        children = np.bincount(parent, minlength=forest.prompts * step.nodes_in)
        state = np.arange(len(children)) if packing == "levels" else np.flatnonzero(children)
        children = children[state]
    child = forest.first_row[step.index + 1] + prompt * step.nodes_out + node
    return (
        forest.first_row[step.index] + state, np.full(len(state), step.index), state // step.nodes_in, children,
        child, node, node // step.fanout, advantage[prompt, node], np.full(len(child), weight),
    )  # fmt: skip


def pass_bounds(edges: Edges, policy: Policy, packing: str) -> list[slice]:
    """Where passes begin and end: full passes over all rows; for "levels" the rollout's own passes, those without an edge left out."""
    if packing != "levels":
        return list(policy.passes(len(edges)))
    bounds, start = [], 0
    for _, count in zip(*np.unique(edges.step, return_counts=True), strict=True):
        bounds += [slice(start + rows.start, start + rows.stop) for rows in policy.passes(int(count))]
        start += int(count)
    return [rows for rows in bounds if edges.children[rows].any()]


def micro_batches(edges: Edges, plan: RolloutPlan, rows: StepCoefficients, bounds: list[slice], dtype: torch.dtype) -> list[MicroBatch]:
    """The rows cut at `bounds` into passes; one copy to the device serves them all."""
    device = rows.x_coef.device
    offsets = np.concatenate([[0], np.cumsum(edges.children)]).astype(np.int64)
    sigmas = np.array([step.sigma for step in plan.steps])

    def put(values: NDArray, kind: torch.dtype) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values)).to(kind)
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host

    whole = {name: put(getattr(edges, name), torch.int64) for name in ("state", "step", "prompt", "child", "node", "parent")}
    child_prompt, child_step = (put(np.repeat(column, edges.children), torch.int64) for column in (edges.prompt, edges.step))
    advantage, weight = put(edges.advantage, dtype), put(edges.weight, dtype)
    sigma, starts = put(sigmas[edges.step], torch.float32), put(offsets, torch.int64)
    return [
        MicroBatch(
            state=whole["state"][row],
            prompt=whole["prompt"][row],
            child=whole["child"][edge],
            node=whole["node"][edge],
            parent=whole["parent"][edge],
            child_prompt=child_prompt[edge],
            child_step=child_step[edge],
            offsets=starts[row.start : row.stop + 1] - int(offsets[row.start]),
            advantage=advantage[edge],
            weight=weight[edge],
            sigma=sigma[row],
            coef=rows[whole["step"][row]],
        )
        for row in bounds
        for edge in [slice(int(offsets[row.start]), int(offsets[row.stop]))]
    ]
