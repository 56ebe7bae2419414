"""The numbers of an iteration, read from the device once: rewards, updates, memory."""

import math
import resource
import sys
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.update.updater import UpdateStats

_OF_EDGES = (
    "ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "approx_kl", "loss", "grad_norm",
    "logp_drift",
)  # fmt: skip


def reward_summary(names: list[str], weights: list[float], scores: Tensor) -> dict[str, Any]:
    """`reward`: {name: {mean, std, group_std}} of scores [prompts, group, rewards] on the CPU, and `zero_std_ratio` of
    those that weigh something.
    """
    reward = {
        name: {
            "mean": of_prompts.mean().item(),
            "std": of_prompts.std(correction=0).item(),
            "group_std": of_prompts.std(1, correction=0).mean().item(),
        }
        for name, of_prompts in zip(names, scores.unbind(-1), strict=True)
    }
    alike = (scores.amax(1) == scores.amin(1)) | (torch.tensor(weights) == 0)
    return {"reward": reward, "zero_std_ratio": alike.all(1).double().mean().item()}


def update_summary(stats: UpdateStats) -> dict[str, float | int | None]:
    """Ratios, clip fractions, KL to the rollout's policy, gradient norm, drift, over edges and updates where they are
    finite; None where there are none, and for a loss that is not finite. How many updates were skipped.
    """
    if not stats.ratio:
        return dict.fromkeys(_OF_EDGES) | {"skipped_updates": 0}
    ratio, clipped, log_ratio = (torch.cat(parts).double() for parts in (stats.ratio, stats.clipped, stats.log_ratio))
    norms = torch.stack(stats.grad_norm or [ratio.new_zeros(0).sum()]).double()
    drift = torch.cat(stats.drift).double().abs() if stats.drift and sum(map(len, stats.drift)) else ratio.new_zeros(1)
    finite = ratio.isfinite()
    numbers = (
        _mean(ratio, finite),
        ratio.where(finite, math.inf).min(),
        ratio.where(finite, -math.inf).max(),
        _mean((clipped < 0).double(), finite),
        _mean((clipped > 0).double(), finite),
        _mean(log_ratio.exp() - 1 - log_ratio),  # Schulman's k3
        torch.stack(stats.loss).double().sum(),
        _mean(norms),
        drift.where(drift.isfinite(), -math.inf).max(),
    )
    skipped = torch.stack(stats.skipped).double() if stats.skipped else ratio.new_zeros(0)
    values = to_host(torch.stack([*numbers, skipped.sum()])).tolist()
    found = {name: value if math.isfinite(value) else None for name, value in zip(_OF_EDGES, values, strict=False)}
    return found | {"skipped_updates": int(values[-1])}


def _mean(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean of those that are finite, or of those that are `counted`; NaN where there are none."""
    counted = values.isfinite() if counted is None else counted
    return values.where(counted, 0).sum() / counted.sum()


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, on a CPU the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
