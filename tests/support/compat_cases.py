"""The published steps as functions of one shape, and their mathematics in float64, written without rows."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from flowgrove_kernels.compat.dance_grpo import flux_step
from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob
from flowgrove_kernels.compat.mix_grpo import dance_grpo_step, flow_grpo_step
from kernel_cases import pad

SIGMAS = torch.tensor([1.0, 0.9375, 0.8571429, 0.75, 0.6, 0.375, 0.0])  # shift 3, six steps
TIMESTEPS = 1000 * SIGMAS[:-1]
SCHEDULER = SimpleNamespace(sigmas=SIGMAS, timesteps=TIMESTEPS)


def mean_and_std(
    kind: str,
    x: Tensor,
    v: Tensor,
    step: Tensor,
    eta: float,
    sigmas: Tensor = SIGMAS,
) -> tuple[Tensor, Tensor]:
    """(μ, s) in float64 of the steps `step` int64 [B] from x under v: the drift from the score, cps from x̂0, x̂1."""
    x, v, sigmas = x.double(), v.double(), sigmas.double()
    sigma, sigma_next = pad(sigmas[step], x), pad(sigmas[step + 1], x)
    dt, clean, noise = sigma_next - sigma, x - sigma * v, x + (1 - sigma) * v
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        return (1 - sigma_next) * clean + (sigma_next**2 - std**2).sqrt() * noise, std
    level = torch.full_like(sigma, eta)
    if kind == "flow_sde":
        level = eta * (sigma / (1 - torch.where(sigma == 1, sigmas[1], sigma))).sqrt()
    score = -(x - (1 - sigma) * clean) / sigma**2
    drift = v if kind == "dance_ode" else v - level**2 / 2 * score
    return x + drift * dt, level * (-dt).sqrt()


def logp_of(kind: str, mean: Tensor, std: Tensor, x_next: Tensor) -> Tensor:
    """The mean over all but the batch, as published: cps without scale, DanceGRPO without constants."""
    squares = (x_next.double().detach() - mean) ** 2
    if kind != "cps":
        squares = squares / (2 * std**2)
    terms = -squares
    if kind == "flow_sde":
        terms = terms - std.log() - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).mean(1)


@dataclass(frozen=True)
class Trainer:
    """One published function. `step(v, x, index, prev_sample, **noise)` → {name: tensor}; index: int or int64 [B]."""

    name: str
    kind: str
    eta: float

    def step(self, v, x, index, prev_sample=None, **noise) -> dict[str, Tensor]:
        sde_type = "cps" if self.kind == "cps" else "sde"
        if self.name == "flow_grpo":
            t = TIMESTEPS[index] if isinstance(index, Tensor) else TIMESTEPS[index : index + 1]
            out = sde_step_with_logprob(SCHEDULER, v, t, x, self.eta, prev_sample, sde_type=sde_type, **noise)
            return dict(zip(("prev_sample", "log_prob", "mean", "std"), out, strict=True))
        if self.name == "mix_grpo flow":
            noise |= {"sde_type": sde_type, "noise_level": self.eta}
            out = flow_grpo_step(v, x, 9.0, SIGMAS, index, prev_sample, **noise)
            return dict(zip(("prev_sample", "original", "log_prob", "mean", "std"), out, strict=True))
        solver = self.kind != "dance_ode"
        if self.name == "dance_grpo":
            out = flux_step(v, x, self.eta, SIGMAS, index, prev_sample, True, solver, **noise)
        else:
            out = dance_grpo_step(v, x, 9.0, SIGMAS, index, prev_sample, True, solver, sde_type, self.eta, **noise)
        return dict(zip(("prev_sample", "original", "log_prob"), out, strict=True))


TRAINERS = (
    Trainer("flow_grpo", "flow_sde", 0.7),
    Trainer("flow_grpo", "cps", 0.8),
    Trainer("dance_grpo", "dance_sde", 0.3),
    Trainer("dance_grpo", "dance_ode", 0.3),
    Trainer("mix_grpo flow", "flow_sde", 0.7),
    Trainer("mix_grpo flow", "cps", 0.5),
    Trainer("mix_grpo dance", "dance_sde", 0.3),
    Trainer("mix_grpo dance", "cps", 0.8),
)
