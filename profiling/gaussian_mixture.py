"""A toy whose policy gradient is known: a mixture of three Gaussians in the plane, whose velocity has a closed form.

    x_σ = (1 − σ)·x0 + σ·ε,   x0 ~ Σ_k π_k·N(m_k, τ²),   v(x, σ) = E[ε − x0 | x_σ = x]

The trained parameters are the means m_k that the velocity believes in, begun at the true ones. The reward prefers a
place beside one of them, the target of the prompt, so that it depends on which mode a sample reaches, which early steps
decide, and on where it ends within it, which late ones do.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowgrove.credit import EdgeCredit, assign_credit
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Credit
from flowgrove.update.passes import step_weights
from flowgrove_kernels import (
    INITIAL_STEP,
    NoiseKey,
    StepCoefficients,
    flow_step,
    grpo_loss,
    philox_normal,
)

MEANS = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # π
SPREAD = 0.35  # τ
TARGETS = MEANS + torch.tensor([[0.3, 0.3], [0.3, -0.3], [-0.4, 0.0]], dtype=torch.float64)  # prompt i wants i mod 3
REACH = 0.5
BATCHES = 50  # of the true gradient


def velocity(x: Tensor, sigma: float, means: Tensor) -> Tensor:
    """E[ε − x0 | x_σ = x] of the mixture around `means` ([3, 2], or [rows, 3, 2] for means of every row's own), for
    float64 x [rows, 2].
    """
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    offset = x.unsqueeze(1) - (1 - sigma) * means  # [rows, 3, 2]
    share = torch.softmax(SHARES.log() - offset.square().sum(-1) / (2 * variance), dim=1)
    slope = (sigma - (1 - sigma) * SPREAD**2) / variance
    return (share.unsqueeze(-1) * (slope * offset - means)).sum(1)


def rewards(x: Tensor) -> Tensor:
    """[rows, 3]: the reward of clean samples x [rows, 2] for every target."""
    return torch.exp(-(x.unsqueeze(1) - TARGETS).square().sum(-1) / (2 * REACH**2))


@dataclass(frozen=True)
class Forests:
    """Rollouts of a plan without a tail, of several prompts. `states[t]`: float64 [prompts · nodes, 2] before step t;
    the last are the leaves.
    """

    plan: RolloutPlan
    prompts: int
    states: list[Tensor]

    @classmethod
    @torch.no_grad()
    def grown(cls, plan: RolloutPlan, prompts: int, seed: int = 0) -> "Forests":
        """With the engine's own coefficients, noise and steps."""
        node = torch.arange(plan.roots).repeat(prompts)
        prompt = torch.arange(prompts).repeat_interleave(plan.roots)
        x = philox_normal((len(node), 2), NoiseKey(seed, 0, INITIAL_STEP, prompt, node)).double()
        rows, states = plan_coefficients(plan), [x]
        for step in plan.steps:
            number = torch.arange(len(x) * step.fanout)
            key = NoiseKey(
                seed, 0, step.index, number // step.nodes_out, number % step.nodes_out,
                number % step.nodes_out // step.fanout,
            )  # fmt: skip
            x, _ = flow_step(
                x, velocity(x, step.sigma, MEANS), _rows_of(rows, step.index, len(x)), fanout=step.fanout,
                key=key if step.stochastic else None,
                sibling_correlation=plan.sibling_correlation if step.stochastic else 0.0,
            )  # fmt: skip
            states.append(x)
        return cls(plan, prompts, states)

    @cached_property
    def scores(self) -> np.ndarray:
        """float64 [prompts, leaves, 1]: each prompt's reward of its own target."""
        of_all = rewards(self.states[-1]).view(self.prompts, self.plan.leaves, 3)
        return of_all[torch.arange(self.prompts), :, torch.arange(self.prompts) % 3].unsqueeze(-1).numpy()

    def gradients(self, credit: Credit, step_weight: str = "uniform", together: int | None = None) -> Tensor:
        """float64 [prompts, 6]: of each prompt the uphill gradient in the means of the engine's loss, by its credit and
        weights; their mean is that of the prompts' update. `together`: the prompts of an iteration, which `std: global`
        normalises together; None: all.
        """
        found = self._credit(credit, together or self.prompts)
        weights, trained = step_weights(self.plan, step_weight), self.plan.trained_steps
        edges = sum(int(found[step.index].trains.sum()) for step in trained) / self.prompts
        rows, means = plan_coefficients(self.plan), MEANS.expand(self.prompts, 3, 2).clone().requires_grad_()
        for step in trained:
            x, x_next = self.states[step.index], self.states[step.index + 1]
            edge = found[step.index]
            weight = torch.from_numpy(edge.trains * (weights[step.index] / edges)).flatten()
            advantage = torch.from_numpy(edge.advantage.flatten())
            v = velocity(x, step.sigma, means.repeat_interleave(step.nodes_in, dim=0))
            loss = grpo_loss(
                x, v, x_next, _rows_of(rows, step.index, len(x)), None, advantage, weight,
                clip_range=1.0, fanout=step.fanout,
            ).loss  # fmt: skip
            loss.backward()
        assert means.grad is not None
        return -means.grad.flatten(1)

    def _credit(self, credit: Credit, together: int) -> dict[int, EdgeCredit]:
        parts = [
            assign_credit(self.plan, credit, self.scores[first : first + together], [1.0], first_prompt=first)
            for first in range(0, self.prompts, together)
        ]
        return {
            index: EdgeCredit(
                np.concatenate([part[index].advantage for part in parts]),
                np.concatenate([part[index].trains for part in parts]),
            )
            for index in parts[0]
        }


def true_gradient(plan: RolloutPlan, samples: int, seed: int = 0, *, ode: bool = False) -> Tensor:
    """The gradient of the expected reward, the mean over targets, in the means: float64 [BATCHES, 6] of as many equal
    shares of `samples`, so that their spread tells its error. Their noise is not the engine's.
    """
    random = torch.Generator().manual_seed(seed)
    size = len(plan.steps) + 1, samples // BATCHES, 2
    drawn = (torch.randn(size, dtype=torch.float64, generator=random) for _ in range(BATCHES))
    return torch.stack([pathwise_gradient(plan, each[0], each[1:], ode=ode) for each in drawn])


def pathwise_gradient(plan: RolloutPlan, x: Tensor, noise: Tensor, *, ode: bool = False) -> Tensor:
    """[6], without a policy gradient: single trajectories from x [samples, 2] with the noise of every step [steps,
    samples, 2] are differentiated from the reward down to the velocities. The means move in the steps that the plan
    trains; `ode`: in all steps of the plain ODE.
    """
    means = MEANS.clone().requires_grad_()
    rewards(run_trajectories(plan, x, noise, means, ode=ode)).mean().backward()
    assert means.grad is not None
    return means.grad.flatten()


def run_trajectories(plan: RolloutPlan, x: Tensor, noise: Tensor, means: Tensor, *, ode: bool = False) -> Tensor:
    """The clean samples of single trajectories, whose velocity believes in `means` wherever the plan trains."""
    columns = plan_coefficients(plan).tensors()[:4]
    for step in plan.steps:
        a, b, c, s = (float(column[step.index]) for column in columns)
        v = velocity(x, step.sigma, means if step.trained or ode else MEANS)
        if ode:
            x = x + (step.sigma_next - step.sigma) * v
        elif c == 0:
            x = a * x + b * v + s * noise[step.index]
        else:
            raise ValueError("the toy knows no solver with history: give a plan without a tail")
    return x


def _rows_of(rows: StepCoefficients, index: int, count: int) -> StepCoefficients:
    return rows[torch.full((count,), index)]
