"""The step, its log-probability and the clipped loss in plain PyTorch, operation by operation as the published GRPO
loops compute them.

Flow-GRPO (2505.05470), DanceGRPO (2505.07818) and MixGRPO (2507.21802) evaluate the same formulas: a velocity in bf16
is promoted, the mean is formed from the noise levels of the rows, noise comes from `randn_like`, the density is written
out per element and averaged, autograd differentiates. Where they differ the version with fewer operations is taken (the
drift folded into the factors of x and v), so that nothing is measured against a slow straw man.

    g = η·√(σ/(1−σ))    μ = x·(1 + g²dt/(2σ)) + v·(1 + g²(1−σ)/(2σ))·dt    s = g·√(−dt)
    logp = mean(−(x'−μ)²/(2s²) − ln s − ½ln 2π)
"""

import math

import torch
from torch import Tensor

NOISE_LEVEL = 0.7
CLIP_RANGE = 0.2  # wide: every row of the benchmark keeps its gradient, so no implementation may skip one


def sde_step(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_next [B, ...], logp [B]); sigma, sigma_next [B]. Draws the noise unless it is given."""
    mean, std = _mean_and_std(x, v, sigma, sigma_next)
    if noise is None:
        noise = torch.randn_like(mean)
    x_next = mean + std * noise
    return x_next, _density(x_next, mean, std)


def log_prob(x: Tensor, v: Tensor, x_next: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """logp [B] of steps that were taken, differentiable in v."""
    return _density(x_next, *_mean_and_std(x, v, sigma, sigma_next))


def clipped_loss(
    x: Tensor, v: Tensor, x_next: Tensor, sigma: Tensor, sigma_next: Tensor, old_logp: Tensor, advantage: Tensor
) -> Tensor:
    """The scalar loss, the mean over the batch, differentiable in v. old_logp, advantage [B]."""
    ratio = torch.exp(log_prob(x, v, x_next, sigma, sigma_next) - old_logp)
    unclipped = -advantage * ratio
    clipped = -advantage * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    return torch.maximum(unclipped, clipped).mean()


def _mean_and_std(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    v = v.to(x.dtype)
    sigma, sigma_next = (level.view(-1, *(1,) * (x.ndim - 1)) for level in (sigma, sigma_next))
    dt = sigma_next - sigma
    g = torch.sqrt(sigma / (1 - sigma)) * NOISE_LEVEL
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g * torch.sqrt(-dt)


def _density(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    per_element = -((x_next.detach() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return per_element.mean(dim=tuple(range(1, mean.ndim)))
