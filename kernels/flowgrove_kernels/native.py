"""The compiled backends, "cpu" and "cuda": each function lays out the inputs, allocates the
outputs and calls the op that csrc/ implements.
"""

from typing import Any

import torch
from torch import Tensor

from flowgrove_kernels import libraries
from flowgrove_kernels.backends import implements
from flowgrove_kernels.layout import fp32, fused_velocity, optional_rows, rows_of
from flowgrove_kernels.loss_arguments import LossArguments

libraries.missing("cuda")  # loads both
_ops = torch.ops.flowgrove_native


@implements("philox_normal", "cpu", "cuda")
def philox_normal(key: Tensor, elements: int) -> Tensor:
    out = key.new_empty((key.shape[1], elements), dtype=torch.float32)
    _ops.philox_normal(key, out)
    return out


@implements("clean_estimate", "cpu", "cuda")
def clean_estimate(x: Tensor, v: Tensor, sigma: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    out = x.new_empty(x.shape)
    _ops.clean_estimate(
        rows_of(x),
        rows_of(fused_velocity(v)),
        fp32(sigma),
        optional_rows(fused_velocity(v_uncond)),
        guidance_scale,
        rows_of(out),
    )
    return out


@implements("flow_step", "cpu", "cuda")
def flow_step(
    x: Tensor, v: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, std: Tensor, precision: Tensor,
    log_norm: Tensor, key: Tensor | None, noise: Tensor | None, history: Tensor | None, v_uncond: Tensor | None,
    fanout: int, sibling_correlation: float, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    edges = x.shape[0] * fanout
    x_next, logp = x.new_empty((edges, *x.shape[1:])), x.new_empty(edges)
    _ops.flow_step(
        rows_of(x), rows_of(fused_velocity(v)), fp32(x_coef), fp32(v_coef), fp32(prev_coef), fp32(std),
        fp32(precision), fp32(log_norm), key, optional_rows(noise), optional_rows(history),
        optional_rows(fused_velocity(v_uncond)), fanout, sibling_correlation, guidance_scale, rows_of(x_next), logp,
    )  # fmt: skip
    return x_next, logp


@implements("flow_logprob", "cpu", "cuda")
def flow_logprob(
    x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, precision: Tensor,
    log_norm: Tensor, child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> Tensor:  # fmt: skip
    logp = x.new_empty(x_next.shape[0])
    _ops.flow_logprob(
        rows_of(x), rows_of(fused_velocity(v)), rows_of(x_next), fp32(x_coef), fp32(v_coef), fp32(prev_coef),
        fp32(precision), fp32(log_norm), _contiguous(child_offsets), optional_rows(fused_velocity(v_uncond)),
        fanout, guidance_scale, logp,
    )  # fmt: skip
    return logp


@implements("flow_logprob_backward", "cpu", "cuda")
def flow_logprob_backward(
    grad: Tensor, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, precision: Tensor,
    child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    velocity, uncond = fused_velocity(v), fused_velocity(v_uncond)
    grad_v, grad_uncond = _gradients(velocity, uncond)
    _ops.flow_logprob_backward(
        fp32(grad), rows_of(x), rows_of(velocity), rows_of(x_next), fp32(x_coef), fp32(v_coef), fp32(precision),
        _contiguous(child_offsets), optional_rows(uncond), fanout, guidance_scale,
        rows_of(grad_v), None if uncond is None else rows_of(grad_uncond),
    )  # fmt: skip
    return grad_v.to(v.dtype), grad_uncond.to(v.dtype)


@implements("grpo_loss", "cpu", "cuda")
def grpo_loss(grad_loss: Tensor | None, *arguments: Any) -> list[Tensor]:
    given = LossArguments(*arguments)
    x, edges = given.x, given.x_next.shape[0]
    velocity, uncond = fused_velocity(given.v), fused_velocity(given.v_uncond)
    loss, logp, ratio, kl = x.new_empty(1), x.new_empty(edges), x.new_empty(edges), x.new_empty(edges)
    clipped = x.new_empty(edges, dtype=torch.int8)
    grad_v, grad_uncond = (None, None) if grad_loss is None else _gradients(velocity, uncond)
    laid_out = given._replace(
        x=rows_of(x),
        v=rows_of(velocity),
        x_next=rows_of(given.x_next),
        x_coef=fp32(given.x_coef),
        v_coef=fp32(given.v_coef),
        prev_coef=fp32(given.prev_coef),
        std=fp32(given.std),
        precision=fp32(given.precision),
        log_norm=fp32(given.log_norm),
        old_logp=None if given.old_logp is None else fp32(given.old_logp),
        advantage=fp32(given.advantage),
        weight=fp32(given.weight),
        child_offsets=_contiguous(given.child_offsets),
        noise=optional_rows(given.noise),
        v_ref=optional_rows(fused_velocity(given.v_ref)),
        v_uncond=optional_rows(uncond),
    )
    _ops.grpo_loss(
        None if grad_loss is None else fp32(grad_loss.reshape(1)),
        *laid_out,
        *(loss, logp, ratio, clipped, kl),
        None if grad_v is None else rows_of(grad_v),
        None if grad_uncond is None or uncond is None else rows_of(grad_uncond),
    )
    scores = [loss.reshape(()), logp, ratio, clipped, kl]
    if grad_v is None or grad_uncond is None:
        return scores
    return [*scores, grad_v.to(given.v.dtype), grad_uncond.to(given.v.dtype)]


def _gradients(v: Tensor, v_uncond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the gradients of v and v_uncond (empty without guidance)."""
    return v.new_empty(v.shape), v.new_empty(0 if v_uncond is None else v.shape)


def _contiguous(offsets: Tensor | None) -> Tensor | None:
    return None if offsets is None else offsets.contiguous()
