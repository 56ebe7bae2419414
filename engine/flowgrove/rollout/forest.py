"""The rollout's memory: the states that training needs, in one flat tensor, level after level, with the log-probability
of the step into each.

Row order inside a level is (prompt, node), so children of a node are contiguous and siblings stay together.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrove.models.policy import Velocity
from flowgrove.passes.packing import Ints
from flowgrove.plan.planner import RolloutPlan, Step


@dataclass
class RetainedPass:
    """A pass of the rollout whose graph waits for the first update's backward: its step, prompts and nodes of its rows,
    and its velocity (None: given up).
    """

    step: int
    prompt: Ints
    node: Ints
    velocity: Velocity | None


@dataclass
class Forest:
    """`states` [S, ...] and `logp` [S] on the device; `first_row[t]`: where level t begins; `leaves` [prompts · leaves,
    ...]: clean latents; `path_logp` [prompts, nodes]: of the newest level's nodes, the logp of their whole path;
    `retained`: passes that training need not run again.
    """

    plan: RolloutPlan
    prompts: int
    states: Tensor
    logp: Tensor
    first_row: dict[int, int]
    leaves: Tensor
    path_logp: Tensor
    retained: list[RetainedPass] = field(default_factory=list)

    @classmethod
    def allocate(
        cls, plan: RolloutPlan, prompts: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "Forest":
        """Room for both ends of every trained step."""
        first_row, rows = {}, 0
        for level in sorted({end for step in plan.trained_steps for end in (step.index, step.index + 1)}):
            first_row[level] = rows
            rows += prompts * nodes_at(plan, level)
        states = torch.empty((rows, *shape), dtype=dtype, device=device)
        logp = torch.zeros(rows, dtype=dtype, device=device)
        path_logp = torch.zeros((prompts, plan.roots), dtype=dtype, device=device)
        return cls(plan, prompts, states, logp, first_row, torch.empty(0, device=device), path_logp)

    @classmethod
    def joined(cls, parts: list["Forest"]) -> "Forest":
        """The forests of some prompts each, of one plan, as one."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        whole = cls.allocate(
            first.plan,
            sum(part.prompts for part in parts),
            first.states.shape[1:],
            first.states.dtype,
            first.states.device,
        )
        whole.leaves, whole.path_logp = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("leaves", "path_logp")
        )
        before = 0
        for part in parts:
            for level, start in part.first_row.items():
                count = part.prompts * nodes_at(first.plan, level)
                offset = whole.first_row[level] + before * nodes_at(first.plan, level)
                whole.states[offset : offset + count] = part.states[start : start + count]
                whole.logp[offset : offset + count] = part.logp[start : start + count]
            for one in part.retained:
                one.prompt = one.prompt + before
            whole.retained += part.retained
            before += part.prompts
        return whole

    def blank(self, prompts: list[int]) -> None:
        """Clears the states of prompts that do not train, and gives up all graphs: in a pass that others share, a row
        that is not finite spoils the gradient even where its own is 0.
        """
        if not prompts:
            return
        self.retained.clear()
        for level, first in self.first_row.items():
            count = nodes_at(self.plan, level)
            for prompt in prompts:
                rows = slice(first + prompt * count, first + (prompt + 1) * count)
                self.states[rows], self.logp[rows] = 0, 0

    def keep(self, level: int, x: Tensor, logp: Tensor | None) -> None:
        """Takes in a level: its distinct states, if training needs them, and the logp of the edges into them (None for
        the roots).

        A state that several rows hold is taken from the first of them.
        """
        count = self.prompts * nodes_at(self.plan, level)
        copies = len(x) // count
        if logp is not None:
            logp = logp[::copies]
            nodes = logp.view(self.prompts, -1)
            self.path_logp = self.path_logp.repeat_interleave(nodes.shape[1] // self.path_logp.shape[1], dim=1) + nodes
        if level in self.first_row:
            rows = slice(self.first_row[level], self.first_row[level] + count)
            self.states[rows] = x[::copies]
            if logp is not None:
                self.logp[rows] = logp


def nodes_at(plan: RolloutPlan, level: int) -> int:
    """States per prompt before step `level`; after the last step, the leaves."""
    return plan.steps[level].nodes_in if level < len(plan.steps) else plan.leaves


def leaf_path_logp(forest: Forest) -> Tensor:
    """Sum of the edges' logp along the path of every leaf, trained or not, [prompts, leaves];
    steps without noise add 0.
    """
    return forest.path_logp


def edges_in_update(plan: RolloutPlan, step: Step, update: int) -> NDArray[np.bool_]:
    """[nodes_out]: the children whose edges belong to `update`."""
    return np.array([plan.update_of_edge(step, child) == update for child in range(step.nodes_out)])
