"""MixGRPO's two steps (arXiv 2507.21802, github.com/Tencent-Hunyuan/MixGRPO).

They are stochastic inside its window and deterministic outside. `dance_grpo_step` is DanceGRPO's and `flow_grpo_step`
Flow-GRPO's, each with "sde" and "cps" rows (see `dance_grpo` and `flow_grpo`).
"""

import torch
from torch import Tensor

from flowgrove_kernels.clean_estimate import clean_estimate
from flowgrove_kernels.coefficients import StepCoefficients, step_coefficients
from flowgrove_kernels.compat import dance_grpo
from flowgrove_kernels.compat.flow_grpo import rows_of_type
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
from flowgrove_kernels.compat.tables import step_table
from flowgrove_kernels.noise import NoiseKey

_CPS_NOISE_LEVEL = 0.8  # where noise_level is None; eta belongs to "sde"


def _level(sde_type: str, eta: float, noise_level: float | None) -> float:
    if noise_level is not None:
        return check_level(noise_level, "noise_level")
    return _CPS_NOISE_LEVEL if sde_type == "cps" else check_level(eta, "eta")


def _euler_rows(sigma: Tensor, sigma_next: Tensor, noise_level: float, second: float) -> StepCoefficients:
    return step_coefficients("ode", sigma, sigma_next)


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    generator: Generators = None,
    key: NoiseKey | None = None,
) -> tuple[Tensor, ...]:
    """(prev_sample [B, ...], pred_original_sample [B, ...], log_prob [B]) if `grpo`, else (mean, pred_original_sample).

    As `dance_grpo.flux_step`, but without `sde_solver` nothing is drawn: the sample is the mean ("sde": of an Euler
    step), its log_prob 0 and `key` unused. noise_level: None takes `eta` for "sde" and 0.8 for "cps". Raises
    ValueError as there, and for an unknown sde_type.
    """
    rows = rows_of_type(sde_type)
    if sde_type == "sde":
        rows = dance_grpo.sde_rows if sde_solver else dance_grpo.ode_rows
    level = _level(sde_type, eta, noise_level)
    given = (model_output, latents, level, sigmas, index, prev_sample, grpo)
    return dance_grpo.dance_step(*given, rows, noisy=sde_solver, generator=generator, key=key)


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor,
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: Generators = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    key: NoiseKey | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(prev_sample [B, ...], pred_original_sample [B, ...], log_prob [B], prev_sample_mean [B, ...], std of the step).

    model_output, latents, prev_sample: [B, ...], any floating-point dtype. sigmas: float [T + 1]; index: the step, an
    int or int64 [], or int64 [B] with one for each sample; std: fp32 [] or [B, 1, ...] accordingly. Without
    `prev_sample` a step is drawn: normals of model_output's dtype from `generator` (torch's own if None), or those that
    `key` names; with it, that step is scored and comes back as it is. `determistic` (spelt as published) returns an
    Euler step whatever was drawn or given, and its log_prob under the SDE; the noise is drawn all the same, so that
    later steps meet the same generator. noise_level: None takes `eta` for "sde" and 0.8 for "cps". Other samples and
    means have the dtype that model_output and latents promote to; log_prob is fp32 (float64 for float64). log_prob,
    prev_sample_mean and pred_original_sample are differentiable in model_output. Raises ValueError for other shapes,
    devices or steps, an unknown sde_type, or both `generator` and `prev_sample`.
    """
    rows = rows_of_type(sde_type)
    check(model_output, latents, prev_sample, name="latents")
    check_noise(prev_sample, generator, key)
    level = _level(sde_type, eta, noise_level)
    result = torch.promote_types(latents.dtype, model_output.dtype)
    x = computed(latents, result)
    coef, sigma, std, _ = step_table(sigmas, rows, level, x.device).at(index, x.shape[0])
    draws = prev_sample is None and key is None
    noise = drawn(x.shape, generator, x.device, model_output.dtype) if draws else None
    if determistic:
        euler = step_table(sigmas, _euler_rows, 0.0, x.device).at(index, x.shape[0]).coef
        prev_sample, noise, key = step_mean(x, model_output.detach(), euler).to(result), None, None
    x_next, logp = step(x, model_output, coef, result, noise=noise, key=key, prev_sample=prev_sample)
    original = clean_estimate(x, model_output, sigma).to(result)
    std = handed_out(std, x) if isinstance(index, Tensor) and index.ndim else std.clone().reshape(())
    return x_next, original, logp, step_mean(x, model_output, coef).to(result), std
