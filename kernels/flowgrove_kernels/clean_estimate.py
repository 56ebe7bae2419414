"""The clean sample that a velocity points at.

x̂0 = x − σ·v        ∂x̂0/∂x = 1,  ∂x̂0/∂v = −σ
"""

import torch
from torch import Tensor

from flowgrove_kernels.affine import column, guided, working_dtype
from flowgrove_kernels.arguments import check_constant, check_tensor, number, wrong
from flowgrove_kernels.backends import implementation, implements
from flowgrove_kernels.checks import check_state, check_velocity


@implements("clean_estimate", "reference")
def _reference(x: Tensor, v: Tensor, sigma: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    flat = x.flatten(1)
    uncond = None if v_uncond is None else v_uncond.reshape(flat.shape)
    estimate = flat - column(sigma, x) * guided(v.reshape(flat.shape), uncond, guidance_scale, working_dtype(x))
    return estimate.view(x.shape)


@torch.library.custom_op("flowgrove::clean_estimate", mutates_args=())
def _op(x: Tensor, v: Tensor, sigma: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    return implementation("clean_estimate", x)(x, v, sigma, v_uncond, guidance_scale)


@_op.register_fake
def _(x: Tensor, v: Tensor, sigma: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output) -> None:
    _, v, sigma, v_uncond, ctx.guidance_scale = inputs
    ctx.dtype, ctx.guided = v.dtype, v_uncond is not None
    ctx.save_for_backward(sigma)


def _backward(ctx, grad: Tensor):
    (sigma,) = ctx.saved_tensors
    grad_v = -sigma.to(grad.dtype).view(-1, *(1,) * (grad.ndim - 1)) * grad
    if not ctx.guided:
        return grad, grad_v.to(ctx.dtype), None, None, None
    gamma = ctx.guidance_scale
    return grad, (gamma * grad_v).to(ctx.dtype), None, ((1 - gamma) * grad_v).to(ctx.dtype), None


_op.register_autograd(_backward, setup_context=_setup)


def clean_estimate(
    x: Tensor, v: Tensor, sigma: float | Tensor, *, v_uncond: Tensor | None = None, guidance_scale: float | None = None
) -> Tensor:
    """x̂0 [B, ...] in the dtype of x; differentiable in x, v, v_uncond.

    x: states, fp32 or float64 [B, ...].
    v, v_uncond: velocities, fp32, bf16, fp16 or float64, in the shape of x; with v_uncond and guidance_scale γ the
        velocity is v_uncond + γ·(v − v_uncond).
    sigma: a number, or floating-point [B]; it must not require grad.

    Raises ValueError for other shapes.
    """
    check_state(x)
    scale = check_velocity(x, v, v_uncond, guidance_scale)
    if not isinstance(sigma, Tensor):
        level = number(sigma, "sigma", "pass a number or a tensor [B]")
        sigma = torch.full((x.shape[0],), level, dtype=x.dtype, device=x.device)
    check_tensor(sigma, "sigma")
    check_constant(sigma, "sigma")
    if sigma.shape not in ((), (x.shape[0],)) or sigma.device != x.device or not sigma.is_floating_point():
        wrong("sigma", sigma, f"pass a number, or a floating-point tensor [{x.shape[0]}] on {x.device}", place=True)
    return torch.ops.flowgrove.clean_estimate(x, v, sigma.expand(x.shape[0]), v_uncond, scale)
