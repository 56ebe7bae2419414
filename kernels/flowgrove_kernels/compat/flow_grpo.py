"""Flow-GRPO's step (arXiv 2505.05470, github.com/yifan123/flow_grpo).

    sde   μ = x·(1 + g²dt/2σ) + v·dt·(1 + g²(1−σ)/2σ),   s = g√−dt,   g = η·√(σ/(1−σ)), σ_max for σ = 1
    cps   μ = (1−σ')·x̂0 + σ'|cos(ηπ/2)|·x̂1,   s = σ'sin(ηπ/2),   "log-probability" −mean (x' − μ)²

σ_max is the table's second entry. "cps" preserves coefficients (arXiv 2509.05952); what it calls a log-probability is
no density.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowgrove_kernels.coefficients import StepCoefficients, step_coefficients
from flowgrove_kernels.compat.steps import (
    Generators,
    check,
    check_level,
    check_noise,
    computed,
    drawn,
    handed_out,
    step,
    step_mean,
)
from flowgrove_kernels.compat.tables import Rows, Timestep, index_of, step_table
from flowgrove_kernels.noise import NoiseKey


def sde_rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
    cap = second if float(sigma[0]) == 1 else None
    return step_coefficients("flow_sde", sigma, sigma_next, noise_level=noise_level, sigma_max=cap)


def cps_rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
    """κ = 1 in every row, also in those that draw no noise."""
    rows = step_coefficients("cps", sigma, sigma_next, noise_level=noise_level)
    return replace(rows, precision=torch.ones_like(rows.precision))


_ROWS: dict[str, Rows] = {"sde": sde_rows, "cps": cps_rows}


def rows_of_type(sde_type: str) -> Rows:
    """The rows of Flow-GRPO's and MixGRPO's `sde_type`. Raises ValueError for another."""
    if not isinstance(sde_type, str) or sde_type not in _ROWS:
        raise ValueError(f"unknown sde_type {sde_type!r}: write 'sde' or 'cps'")
    return _ROWS[sde_type]


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Timestep,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: Generators = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    *,
    key: NoiseKey | None = None,
) -> tuple[Tensor, ...]:
    """(prev_sample [B, ...], log_prob [B], prev_sample_mean [B, ...], std_dev_t [n, 1, ...]), all fp32.

    With `return_sqrt_dt` also √−dt [n, 1, ...]. self: a scheduler of diffusers with `sigmas` [T + 1] and `timesteps`
    [T]. timestep: entries of `timesteps`, one for each sample ([B], n = B) or one for all (a number, or [1]; n = 1).
    model_output, sample, prev_sample: [B, ...], any floating-point dtype; all is computed in fp32. Without
    `prev_sample` a step is drawn: fp32 normals from `generator` (one, or a list of B; torch's own if None), or those
    that `key` names. With it, that step is scored. log_prob (a mean over all but the batch) and prev_sample_mean are
    differentiable in model_output. std_dev_t: g for "sde" (the step's deviation is g√−dt), s for "cps". Where a step
    has no noise (noise_level 0) "sde" gives log_prob 0; the published function gives NaN. Raises ValueError for other
    shapes or devices, a timestep not in the table, an unknown sde_type, or both `generator` and `prev_sample`.
    """
    rows = rows_of_type(sde_type)
    check(model_output, sample, prev_sample, name="sample")
    check_noise(prev_sample, generator, key)
    noise_level = check_level(noise_level, "noise_level")
    x = computed(sample, torch.float32)
    v = model_output.float() if model_output.dtype == torch.float64 else model_output
    table = step_table(self.sigmas, rows, noise_level, x.device)
    coef, _, std, sqrt_dt = table.at(index_of(self.timesteps, timestep, x.shape[0]), x.shape[0])
    draws = prev_sample is None and key is None
    noise = drawn(x.shape, generator, x.device, torch.float32) if draws else None
    prev_sample = None if prev_sample is None else prev_sample.float()
    x_next, logp = step(x, v, coef, torch.float32, noise=noise, key=key, prev_sample=prev_sample)
    std_dev_t = std / sqrt_dt if sde_type == "sde" else std
    results = (x_next, logp, step_mean(x, v, coef), handed_out(std_dev_t, x))
    return (*results, handed_out(sqrt_dt, x)) if return_sqrt_dt else results
