"""DanceGRPO's step (arXiv 2505.07818, github.com/XueZeyue/DanceGRPO): flow SDE with a constant noise level g = η.

    μ = x + dt·v + dt·η²/2σ²·(x − (1−σ)x̂0),   s = η√−dt,   log_prob = −mean (x' − μ)²/2s²

The published function leaves the density's constants out, so does this one: ratios are the same. `flow_logprob` with
"dance_sde" rows has them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from flowgrove_kernels.clean_estimate import clean_estimate
from flowgrove_kernels.coefficients import StepCoefficients, step_coefficients
from flowgrove_kernels.compat.steps import Generators, check, check_level, check_noise, computed, drawn, step, step_mean
from flowgrove_kernels.compat.tables import Rows, step_table
from flowgrove_kernels.noise import NoiseKey


def sde_rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
    rows = step_coefficients("dance_sde", sigma, sigma_next, noise_level=noise_level)
    return replace(rows, log_norm=torch.zeros_like(rows.log_norm))


def ode_rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
    """The mean of an Euler step, the deviation of the SDE's."""
    mean = step_coefficients("ode", sigma, sigma_next)
    return replace(sde_rows(sigma, sigma_next, noise_level, second), x_coef=mean.x_coef, v_coef=mean.v_coef)


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    generator: Generators = None,
    key: NoiseKey | None = None,
) -> tuple[Tensor, ...]:
    """(prev_sample [B, ...], pred_original_sample [B, ...], log_prob [B]) if `grpo`, else (mean, pred_original_sample).

    model_output, latents, prev_sample: [B, ...], any floating-point dtype. sigmas: float [T + 1]; index: the step, an
    int or int64 [], or int64 [B] with one for each sample. sde_solver: the SDE's mean, else that of an Euler step, with
    the same noise. Without `prev_sample` a step is drawn: normals of the results' dtype from `generator` (torch's own
    if None, as published), or those that `key` names; with it, that step is scored and comes back as it is. Other
    samples and means have the dtype that model_output and latents promote to; log_prob is fp32 (float64 for float64)
    and computed from the sample as returned. log_prob, pred_original_sample and the mean are differentiable in
    model_output. Raises ValueError for other shapes, devices or steps, or both `generator` and `prev_sample`.
    """
    rows = sde_rows if sde_solver else ode_rows
    given = (model_output, latents, check_level(eta, "eta"), sigmas, index, prev_sample, grpo)
    return dance_step(*given, rows, noisy=True, generator=generator, key=key)


def dance_step(
    model_output: Tensor,
    latents: Tensor,
    noise_level: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    rows: Rows,
    *,
    noisy: bool,
    generator: Generators,
    key: NoiseKey | None,
) -> tuple[Tensor, ...]:
    """`flux_step` for any `rows`; what is drawn without `noisy` is the mean."""
    check(model_output, latents, prev_sample, name="latents")
    check_noise(prev_sample, generator, key)
    result = torch.promote_types(latents.dtype, model_output.dtype)
    x = computed(latents, result)
    coef, sigma, *_ = step_table(sigmas, rows, noise_level, x.device).at(index, x.shape[0])
    original = clean_estimate(x, model_output, sigma).to(result)
    if not grpo:
        return step_mean(x, model_output, coef).to(result), original
    draws = noisy and prev_sample is None and key is None
    noise = drawn(x.shape, generator, x.device, result) if draws else None
    inside = key if noisy else None
    x_next, logp = step(x, model_output, coef, result, noise=noise, key=inside, prev_sample=prev_sample)
    return x_next, original, logp
