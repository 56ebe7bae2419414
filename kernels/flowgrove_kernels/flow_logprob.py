"""The log-probability of given steps, differentiable in the velocity.

r = x' − μ        logp = log_norm − κ·mean_D r²        ∂logp/∂v = (2κb/D)·r, summed over the children of a state
"""

from inspect import signature

import torch
from torch import Tensor

from flowgrove_kernels.affine import children_of, guided, log_probability, step_mean, working_dtype
from flowgrove_kernels.backends import implementation, implements
from flowgrove_kernels.checks import check_coefficients, check_edges, check_state, check_velocity, require_no_history
from flowgrove_kernels.coefficients import StepCoefficients


def residual_of(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    x_coef: Tensor,
    v_coef: Tensor,
    v_uncond: Tensor | None,
    guidance_scale: float,
    parent: Tensor,
) -> Tensor:
    """x' − μ of every edge, [E, D]; trained rows have no history term."""
    flat = x.flatten(1)
    uncond = None if v_uncond is None else v_uncond.reshape(flat.shape)
    velocity = guided(v.reshape(flat.shape), uncond, guidance_scale, working_dtype(x))
    mean = step_mean(flat, velocity, x_coef, v_coef, torch.zeros_like(x_coef), None)
    return x_next.reshape(x_next.shape[0], flat.shape[1]) - mean[parent]


def sum_children(values: Tensor, child_offsets: Tensor) -> Tensor:
    """[E, D] → [B, D]: children of a state added in order."""
    if values.shape[0] == 0 or values.shape[1] == 0:
        return values.new_zeros(child_offsets.shape[0] - 1, values.shape[1])
    return torch.segment_reduce(values, "sum", offsets=child_offsets, unsafe=True, initial=0.0)


def split_guidance(grad: Tensor, v: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Gradient of the guided velocity [B, D] → those of v and v_uncond (empty
    without guidance), in their shape and dtype.
    """
    grad = grad.view(v.shape)
    if v_uncond is None:
        return grad.to(v.dtype), v.new_empty(0)
    return (guidance_scale * grad).to(v.dtype), ((1 - guidance_scale) * grad).to(v.dtype)


@implements("flow_logprob", "reference")
def _reference(
    x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, precision: Tensor,
    log_norm: Tensor, child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> Tensor:  # fmt: skip
    parent, _ = children_of(child_offsets, x.shape[0], fanout, x_next.shape[0], x.device)
    require_no_history(prev_coef)
    residual = residual_of(x, v, x_next, x_coef, v_coef, v_uncond, guidance_scale, parent)
    return log_probability(residual, precision[parent], log_norm[parent])


@implements("flow_logprob_backward", "reference")
def _reference_backward(
    grad: Tensor, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, precision: Tensor,
    child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parent, offsets = children_of(child_offsets, x.shape[0], fanout, x_next.shape[0], x.device)
    residual = residual_of(x, v, x_next, x_coef, v_coef, v_uncond, guidance_scale, parent)
    slope = (2 * precision.to(grad.dtype) * v_coef.to(grad.dtype))[parent] / max(residual.shape[1], 1)
    grad_v = sum_children((grad * slope).unsqueeze(1) * residual, offsets)
    return split_guidance(grad_v, v, v_uncond, guidance_scale)


@torch.library.custom_op("flowgrove::flow_logprob", mutates_args=())
def _op(
    x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, precision: Tensor,
    log_norm: Tensor, child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> Tensor:  # fmt: skip
    run = implementation("flow_logprob", x)
    constants = (child_offsets, v_uncond, fanout, guidance_scale)
    return run(x, v, x_next, x_coef, v_coef, prev_coef, precision, log_norm, *constants)


@_op.register_fake
def _(x, v, x_next, x_coef, v_coef, prev_coef, precision, log_norm, child_offsets, v_uncond, fanout, guidance_scale):
    return x.new_empty((x_next.shape[0],))


@torch.library.custom_op("flowgrove::flow_logprob_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, precision: Tensor,
    child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    run = implementation("flow_logprob_backward", x)
    return run(grad, x, v, x_next, x_coef, v_coef, precision, child_offsets, v_uncond, fanout, guidance_scale)


@_op_backward.register_fake
def _(grad, x, v, x_next, x_coef, v_coef, precision, child_offsets, v_uncond, fanout, guidance_scale):
    return v.new_empty(v.shape), v.new_empty((0,) if v_uncond is None else v.shape)


_INPUTS = tuple(signature(_reference).parameters)  # of flowgrove::flow_logprob, by name


def _setup(ctx, inputs, output) -> None:
    x, v, x_next, x_coef, v_coef, _, precision, _, child_offsets, v_uncond, ctx.fanout, ctx.guidance_scale = inputs
    ctx.save_for_backward(x, v, x_next, x_coef, v_coef, precision, child_offsets, v_uncond)


def _backward(ctx, grad: Tensor):
    saved = ctx.saved_tensors  # once: checkpointing computes them when they are read, and forgets them
    grad_v, grad_uncond = torch.ops.flowgrove.flow_logprob_backward(grad, *saved, ctx.fanout, ctx.guidance_scale)
    gradients = {"v": grad_v, "v_uncond": None if saved[-1] is None else grad_uncond}
    return tuple(gradients.get(name) for name in _INPUTS)


_op.register_autograd(_backward, setup_context=_setup)


def flow_logprob(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: StepCoefficients,
    *,
    fanout: int = 1,
    child_offsets: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """logp [E] in the dtype of x, for E steps x → x_next. Differentiable in v and v_uncond; x and x_next are constants.

    x: states, fp32 (or float64) [B, ...].
    v, v_uncond: velocities, fp32, bf16, fp16 or float64, in the shape of x; v_uncond goes with guidance_scale γ.
    x_next: [E, ...] in the dtype of x, children of a row contiguous: `fanout` each, or as many as `child_offsets`
        (int64 [B + 1], CSR) says.
    coef: B one-step rows, which must not require grad; one with prev_coef ≠ 0 fails, on the device.

    Raises ValueError for other shapes, dtypes or devices.
    """
    check_state(x)
    scale = check_velocity(x, v, v_uncond, guidance_scale)
    check_coefficients(coef, x)
    check_edges(x, x_next, fanout, child_offsets)
    return torch.ops.flowgrove.flow_logprob(
        x.detach(),
        v,
        x_next.detach(),
        coef.x_coef,
        coef.v_coef,
        coef.prev_coef,
        coef.precision,
        coef.log_norm,
        child_offsets,
        v_uncond,
        fanout,
        scale,
    )
