"""One denoising step of every sample and its log-probability.

    μ = a·x + b·v + c·p        x' = μ + s·z        logp = log_norm − κ·mean_D (x' − μ)²

logp is computed from the rounded x', never from s·z, so that `flow_logprob` and
`grpo_loss` find the same value to the last bit.
"""

import torch
from torch import Tensor

from flowgrove_kernels.affine import column, guided, log_probability, step_mean, working_dtype
from flowgrove_kernels.arguments import check_fanout
from flowgrove_kernels.backends import implementation, implements
from flowgrove_kernels.checks import (
    check_coefficients,
    check_correlation,
    check_like,
    check_state,
    check_velocity,
    detached,
    packed_key,
    require_no_history,
)
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.noise import NoiseKey, given_or_drawn


@implements("flow_step", "reference")
def _reference(
    x: Tensor, v: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, std: Tensor, precision: Tensor,
    log_norm: Tensor, key: Tensor | None, noise: Tensor | None, history: Tensor | None, v_uncond: Tensor | None,
    fanout: int, sibling_correlation: float, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, dtype = x.shape[0], working_dtype(x)
    flat = x.flatten(1)  # [B, D]
    uncond = None if v_uncond is None else v_uncond.reshape(flat.shape)
    velocity = guided(v.reshape(flat.shape), uncond, guidance_scale, dtype)
    if history is not None:
        history = history.reshape(flat.shape)
    else:
        require_no_history(prev_coef)
    mean = step_mean(flat, velocity, x_coef, v_coef, prev_coef, history)
    mean = mean.repeat_interleave(fanout, 0)  # [B·fanout, D]
    if noise is None and key is None:
        x_next = mean.clone()
    else:
        z = given_or_drawn(noise, key, mean.shape, sibling_correlation)
        x_next = mean + column(std, mean).repeat_interleave(fanout, 0) * z.to(dtype)
    logp = log_probability(x_next - mean, precision.repeat_interleave(fanout), log_norm.repeat_interleave(fanout))
    return x_next.view(batch * fanout, *x.shape[1:]), logp


@torch.library.custom_op("flowgrove::flow_step", mutates_args=())
def _op(
    x: Tensor, v: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, std: Tensor, precision: Tensor,
    log_norm: Tensor, key: Tensor | None, noise: Tensor | None, history: Tensor | None, v_uncond: Tensor | None,
    fanout: int, sibling_correlation: float, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = implementation("flow_step", x)
    return run(
        x,
        v,
        x_coef,
        v_coef,
        prev_coef,
        std,
        precision,
        log_norm,
        key,
        noise,
        history,
        v_uncond,
        fanout,
        sibling_correlation,
        guidance_scale,
    )


@_op.register_fake
def _(
    x,
    v,
    x_coef,
    v_coef,
    prev_coef,
    std,
    precision,
    log_norm,
    key,
    noise,
    history,
    v_uncond,
    fanout,
    sibling_correlation,
    guidance_scale,
):
    edges = x.shape[0] * fanout
    return x.new_empty((edges, *x.shape[1:])), x.new_empty((edges,))


def flow_step(
    x: Tensor,
    v: Tensor,
    coef: StepCoefficients,
    *,
    key: NoiseKey | None = None,
    noise: Tensor | None = None,
    history: Tensor | None = None,
    fanout: int = 1,
    sibling_correlation: float = 0.0,
    v_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_next [B·fanout, ...], logp [B·fanout]), both in the dtype of x; not differentiable, whatever requires grad.

    Child c of row p is row p·fanout + c.

    x: states, fp32 (or float64) [B, ...].
    v, v_uncond: velocities, fp32, bf16, fp16 or float64, in the shape of x; v_uncond goes with guidance_scale γ.
    coef: B rows, which must not require grad; without `history` one with prev_coef ≠ 0 fails, on the device.
    key, noise: `key` names the noise, which is drawn inside, or `noise` [B·fanout, ...] in the dtype of x is it; with
        neither, x_next = μ.
    history: the previous clean estimate p [B, ...], for multistep rows.
    sibling_correlation: children of one row share √ρ of their noise (needs key.parent).

    Raises ValueError for shapes, dtypes, devices or combinations other than these.
    """
    check_state(x)
    scale = check_velocity(x, v, v_uncond, guidance_scale)
    check_coefficients(coef, x)
    check_like(history, "history", x.shape, x)
    check_fanout(fanout)
    edges = x.shape[0] * fanout
    if key is not None and noise is not None:
        raise ValueError("key and noise are two ways to say the same: pass one")
    check_like(noise, "noise", (edges, *x.shape[1:]), x)
    correlation = check_correlation(sibling_correlation, key)
    return torch.ops.flowgrove.flow_step(
        x.detach(),
        v.detach(),
        *coef.tensors(),
        packed_key(key, edges, x.device),
        detached(noise),
        detached(history),
        detached(v_uncond),
        fanout,
        correlation,
        scale,
    )
