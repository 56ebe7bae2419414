"""The numbers of an iteration, read from the device once: rewards, updates, memory."""

import math
import resource
import sys

import torch
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.update.updater import UpdateStats


def reward_summary(names: list[str], scores: Tensor) -> dict[str, dict[str, float]]:
    """{name: {mean, std}} of scores [B, rewards] on the CPU."""
    return {
        name: {"mean": column.mean().item(), "std": column.std(correction=0).item()}
        for name, column in zip(names, scores.T, strict=True)
    }


def update_summary(stats: UpdateStats) -> dict[str, float | int | None]:
    """Ratios, clip fractions, KL to the rollout's policy, gradient norm, drift;
    None where nothing was trained or a number is not finite.
    """
    if not stats.ratio:
        return dict.fromkeys(
            (
                "ratio_mean",
                "ratio_min",
                "ratio_max",
                "clipped_low",
                "clipped_high",
                "approx_kl",
                "loss",
                "grad_norm",
                "logp_drift",
            )
        )
    ratio, clipped, log_ratio = (torch.cat(parts).double() for parts in (stats.ratio, stats.clipped, stats.log_ratio))
    numbers = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_low": (clipped < 0).double().mean(),
        "clipped_high": (clipped > 0).double().mean(),
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),  # Schulman's k3
        "loss": torch.stack(stats.loss).double().sum(),
        "grad_norm": torch.stack(stats.grad_norm).double().mean(),
        "logp_drift": torch.cat(stats.drift).double().abs().max()
        if stats.drift and sum(map(len, stats.drift))
        else ratio.new_zeros(()),
    }
    values = to_host(torch.stack(list(numbers.values()))).tolist()
    return {name: value if math.isfinite(value) else None for name, value in zip(numbers, values, strict=True)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, on a CPU the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
