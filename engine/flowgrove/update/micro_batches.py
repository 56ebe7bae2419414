"""The passes of an optimiser update as device tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrove.device import to_device
from flowgrove.models.policy import Velocity
from flowgrove.passes.packing import Ints
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Expert
from flowgrove.update.edges import Edges
from flowgrove_kernels import StepCoefficients


@dataclass(frozen=True)
class MicroBatch:
    """One pass: B rows with E children between them. `velocity`: the rollout's own, with its graph, where it was
    retained; `expert`: that runs it, None: the one transformer.
    """

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
    prompts: Ints  # `prompt` on the host
    states: Ints  # `state` on the host
    velocity: Velocity | None
    expert: Expert | None

    def __len__(self) -> int:
        return len(self.prompts)


def micro_batches(
    edges: Edges,
    plan: RolloutPlan,
    coefficients: StepCoefficients,
    passes: list[Ints],
    retained: list[Velocity],
    weight_scale: float,
    dtype: torch.dtype,
) -> list[MicroBatch]:
    """The rows of each pass (positions in `edges`); one copy to the device serves them all.

    `retained`: the velocities of the first passes, as far as they go. `weight_scale` multiplies the edges' weights.
    """
    if not passes:
        return []
    edges = edges.take(np.concatenate(passes))
    device = coefficients.x_coef.device
    offsets = np.concatenate([[0], np.cumsum(edges.children)]).astype(np.int64)
    sigmas = np.array([step.sigma for step in plan.steps])

    def put(values: NDArray, kind: torch.dtype) -> Tensor:
        return to_device(torch.from_numpy(np.ascontiguousarray(values)).to(kind), device)

    whole = {
        name: put(getattr(edges, name), torch.int64) for name in ("state", "step", "prompt", "child", "node", "parent")
    }
    child_prompt, child_step = (
        put(np.repeat(column, edges.children), torch.int64) for column in (edges.prompt, edges.step)
    )
    advantage, weight = put(edges.advantage, dtype), put(edges.weight * weight_scale, dtype)
    sigma, starts = put(sigmas[edges.step], torch.float32), put(offsets, torch.int64)
    ends = np.cumsum([len(part) for part in passes])
    velocities = [*retained, *[None] * (len(passes) - len(retained))]
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
            coef=coefficients[whole["step"][row]],
            prompts=edges.prompt[row],
            states=edges.state[row],
            velocity=velocity,
            expert=plan.steps[edges.step[row.start]].expert,
        )
        for end, part, velocity in zip(ends, passes, velocities, strict=True)
        for row in [slice(int(end) - len(part), int(end))]
        for edge in [slice(int(offsets[row.start]), int(offsets[row.stop]))]
    ]
