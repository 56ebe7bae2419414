"""The rollout's memory: the states that training needs, in one flat tensor, level after level, with the log-probability of the step into each.

Row order inside a level is (prompt, node), so children of a node are contiguous and siblings stay together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrove.plan import RolloutPlan


@dataclass
class Forest:
    """`states` [S, ...] and `logp` [S] on the device; `first_row[t]`: where level t begins; `leaves` [prompts · leaves, ...]: clean latents."""

    plan: RolloutPlan
    prompts: int
    states: Tensor
    logp: Tensor
    first_row: dict[int, int]
    leaves: Tensor

    @classmethod
    def allocate(cls, plan: RolloutPlan, prompts: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Forest":
        """Room for both ends of every trained step."""
        first_row, rows = {}, 0
        for level in sorted({end for step in plan.trained_steps for end in (step.index, step.index + 1)}):
            first_row[level] = rows
            rows += prompts * nodes_at(plan, level)
        states = torch.empty((rows, *shape), dtype=dtype, device=device)
        logp = torch.zeros(rows, dtype=dtype, device=device)
        return cls(plan, prompts, states, logp, first_row, torch.empty(0, device=device))

    def keep(self, level: int, x: Tensor, logp: Tensor | None) -> None:
        """Stores the distinct states of a level if training needs it; a state that several rows hold is taken from the first of them."""
        if level in self.first_row:
            count = self.prompts * nodes_at(self.plan, level)
            rows, copies = slice(self.first_row[level], self.first_row[level] + count), len(x) // count
            self.states[rows] = x[::copies]
            if logp is not None:
                self.logp[rows] = logp[::copies]


def nodes_at(plan: RolloutPlan, level: int) -> int:
    """States per prompt before step `level`; after the last step, the leaves."""
    return plan.steps[level].nodes_in if level < len(plan.steps) else plan.leaves


def leaf_path_logp(forest: Forest) -> Tensor:
    """Sum of the trained edges' logp along the path of every leaf, [prompts, leaves]."""
    total = forest.logp.new_zeros(forest.prompts, forest.plan.leaves)
    for step in forest.plan.trained_steps:
        first = forest.first_row[step.index + 1]
        edges = forest.logp[first : first + forest.prompts * step.nodes_out].view(forest.prompts, step.nodes_out)
        total += edges.repeat_interleave(forest.plan.leaves // step.nodes_out, dim=1)
    return total
