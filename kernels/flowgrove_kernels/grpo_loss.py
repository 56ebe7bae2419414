"""The clipped GRPO loss of E edges and its gradient with respect to the velocity.

    log ρ_e = logp_new − logp_old                                    ("density")
    log ρ_e = s·mean z² − mean z⊙(x' − μ)                            ("guard": mean z⊙Δμ, from the step's own noise z)
    L_e     = max(−A_e·ρ_e, −A_e·clip(ρ_e, 1−ε_lo, 1+ε_hi))
    KL_e    = b²·mean_D (v − v_ref)²/(2s²)
    loss    = Σ_e w_e·L_e + β·Σ_e w_e·KL_e

    ∂loss/∂v = Σ_children c_e·(x'_e − μ) + Σ_children 2β·w_e·b²(v − v_ref)/(2s²D)
    c_e      = −w_e·A_e·ρ_e·[gradient kept]·2κb/D
    guard: c_e·(x'_e − μ) becomes −w_e·A_e·ρ_e·[gradient kept]·b·z/D

The clip removes the gradient iff (A > 0 and ρ > 1+ε_hi) or (A < 0 and ρ < 1−ε_lo).
Sources: GRPO (2402.03300), Flow-GRPO (2505.05470).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrove_kernels.affine import (
    children_of,
    column,
    fold_sum,
    guided,
    log_probability,
    mean_over_elements,
    working_dtype,
)
from flowgrove_kernels.backends import implementation, implements
from flowgrove_kernels.checks import detached, require_no_history
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.flow_logprob import residual_of, split_guidance, sum_children
from flowgrove_kernels.loss_arguments import CONSTANTS, SCHEMA, TENSORS, LossArguments, checked_arguments
from flowgrove_kernels.noise import NoiseKey, given_or_drawn


class GRPOLoss(NamedTuple):
    """What the loss returns, in the dtype of the states but for `clipped`."""

    loss: Tensor  # scalar
    logp: Tensor  # [E]
    ratio: Tensor  # [E]
    clipped: Tensor  # int8 [E]: −1 where ρ < 1−ε_lo, +1 where ρ > 1+ε_hi, else 0, whatever the sign of A
    kl: Tensor  # [E]


@implements("grpo_loss", "reference")
def _reference(grad_loss: Tensor | None, *arguments: Any) -> list[Tensor]:
    """loss, logp, ratio, clipped, kl; and, with grad_loss (a scalar that scales them), the gradients of v and v_uncond.

    `arguments`: LossArguments, here and in the other backends.
    """
    given = LossArguments(*arguments)
    x, v, v_uncond, guidance_scale = given.x, given.v, given.v_uncond, given.guidance_scale
    dtype = working_dtype(x)
    require_no_history(given.prev_coef)
    parent, offsets = children_of(given.child_offsets, x.shape[0], given.fanout, given.x_next.shape[0], x.device)
    residual = residual_of(x, v, given.x_next, given.x_coef, given.v_coef, v_uncond, guidance_scale, parent)  # [E, D]
    elements = max(residual.shape[1], 1)
    advantage, weight = given.advantage.to(dtype), given.weight.to(dtype)
    slope, std, precision = given.v_coef.to(dtype)[parent], given.std.to(dtype)[parent], given.precision[parent]
    logp = log_probability(residual, precision, given.log_norm[parent])

    z = None
    if given.guard:
        z = given_or_drawn(given.noise, given.key, residual.shape, given.sibling_correlation).to(dtype)
    if given.old_logp is None:
        ratio = torch.ones_like(logp)
    elif z is not None:
        ratio = torch.exp(std * mean_over_elements(z * z) - mean_over_elements(z * residual))
    else:
        ratio = torch.exp(logp - given.old_logp.to(dtype))
    low, high = 1 - given.clip_low, 1 + given.clip_high
    above, below = ratio > high, ratio < low
    clipped = above.to(torch.int8) - below.to(torch.int8)
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high))
    loss = fold_sum(weight * surrogate)

    kl, pull, drift = torch.zeros_like(logp), None, None
    if given.v_ref is not None:
        flat = (x.shape[0], residual.shape[1])
        uncond = None if v_uncond is None else v_uncond.reshape(flat)
        drift = guided(v.reshape(flat), uncond, guidance_scale, dtype) - given.v_ref.reshape(flat).to(dtype)  # [B, D]
        pull = torch.where(std > 0, slope.square() / (2 * std.square()), 0.0)  # b²/(2s²), 0 where a step has no noise
        kl = pull * mean_over_elements(drift * drift)[parent]
        loss = loss + given.kl_weight * fold_sum(weight * kl)
    scores = [loss, logp, ratio, clipped, kl]
    if grad_loss is None:
        return scores

    scale = grad_loss.to(dtype)
    kept = ~((advantage > 0) & above | (advantage < 0) & below)
    push = torch.where(kept, -weight * advantage * ratio * slope / elements, 0.0) * scale
    if z is not None:
        edge_grad = column(push, residual) * z
    else:
        edge_grad = column(push * 2 * precision.to(dtype), residual) * residual
    if pull is not None and drift is not None:
        pull_of_edge = 2 * given.kl_weight * weight * pull / elements * scale
        edge_grad = edge_grad + column(pull_of_edge, residual) * drift[parent]
    return [*scores, *split_guidance(sum_children(edge_grad, offsets), v, v_uncond, guidance_scale)]


@torch.library.custom_op(
    "flowgrove::grpo_loss", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _op(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(implementation("grpo_loss", LossArguments(*arguments).x)(None, *arguments))


@torch.library.custom_op(
    "flowgrove::grpo_loss_and_grad",
    mutates_args=(),
    schema=f"(Tensor grad_loss, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op_and_grad(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(implementation("grpo_loss", LossArguments(*arguments).x)(grad_loss, *arguments))


@_op.register_fake
def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = LossArguments(*arguments)
    edges, like = given.x_next.shape[0], given.x
    clipped = like.new_empty(edges, dtype=torch.int8)
    return like.new_empty(()), like.new_empty(edges), like.new_empty(edges), clipped, like.new_empty(edges)


@_op_and_grad.register_fake
def _fake_and_grad(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    v, v_uncond = LossArguments(*arguments).v, LossArguments(*arguments).v_uncond
    return *_fake(*arguments), v.new_empty(v.shape), v.new_empty((0,) if v_uncond is None else v.shape)


def _setup(ctx, inputs, output) -> None:
    given = LossArguments(*inputs)
    ctx.save_for_backward(*(getattr(given, name) for name in TENSORS))
    ctx.constants = {name: getattr(given, name) for name in CONSTANTS}
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the four outputs that nobody differentiates


def _backward(ctx, grad_loss: Tensor | None, *unused: Tensor | None):
    gradients: dict[str, Tensor | None] = {}
    if grad_loss is not None:
        given = LossArguments(**dict(zip(TENSORS, ctx.saved_tensors, strict=True)), **ctx.constants)
        *_, grad_v, grad_uncond = torch.ops.flowgrove.grpo_loss_and_grad(grad_loss, *given)
        gradients = {"v": grad_v, "v_uncond": None if given.v_uncond is None else grad_uncond}
    return tuple(gradients.get(name) for name in LossArguments._fields)


_op.register_autograd(_backward, setup_context=_setup)


def grpo_loss(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: StepCoefficients,
    old_logp: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_range: float | tuple[float, float],
    fanout: int = 1,
    child_offsets: Tensor | None = None,
    ratio: str = "density",
    key: NoiseKey | None = None,
    noise: Tensor | None = None,
    sibling_correlation: float = 0.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    v_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> GRPOLoss:
    """Σ_e w_e·L_e + β·Σ_e w_e·KL_e over E edges; only `loss` is differentiable, in v and v_uncond;
    states, scores, noise and v_ref are constants, whatever requires grad.

    x: states, fp32 (or float64) [B, ...].
    v, v_uncond: velocities, fp32, bf16, fp16 or float64, in the shape of x; v_uncond goes with guidance_scale γ.
    x_next: [E, ...] in the dtype of x, children of a state contiguous: `fanout` each, or as many as `child_offsets`
        (int64 [B + 1], CSR) says.
    coef: B one-step rows, which must not require grad; one with prev_coef ≠ 0 fails, on the device.
    old_logp, advantage, weight: fp32 (or the dtype of x) [E]; old_logp None: on-policy, ρ = 1 by stop-gradient.
    clip_range: ε or (ε_lo, ε_hi).
    ratio: "density", or "guard", which needs the noise of the steps: its `key` (and sibling_correlation) or `noise`.
    v_ref: the reference model's (guided) velocity [B, ...], with kl_weight β.

    Raises ValueError for other shapes, dtypes, devices or combinations.
    """
    arguments = checked_arguments(
        x, v, x_next, coef, old_logp, advantage, weight, clip_range, fanout, child_offsets, ratio, key, noise,
        sibling_correlation, v_ref, kl_weight, v_uncond, guidance_scale,
    )  # fmt: skip
    loss, *rest = torch.ops.flowgrove.grpo_loss(*arguments)
    return GRPOLoss(loss, *rest)


def grpo_loss_and_grad(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    coef: StepCoefficients,
    old_logp: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip_range: float | tuple[float, float],
    fanout: int = 1,
    child_offsets: Tensor | None = None,
    ratio: str = "density",
    key: NoiseKey | None = None,
    noise: Tensor | None = None,
    sibling_correlation: float = 0.0,
    v_ref: Tensor | None = None,
    kl_weight: float = 0.0,
    v_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> tuple[GRPOLoss, Tensor, Tensor | None]:
    """`grpo_loss` and its gradients in one pass: (GRPOLoss, grad_v, grad_v_uncond or None).

    The gradients have the shape and dtype of v. Arguments and errors are those of `grpo_loss`.
    """
    arguments = checked_arguments(
        x, v, x_next, coef, old_logp, advantage, weight, clip_range, fanout, child_offsets, ratio, key, noise,
        sibling_correlation, v_ref, kl_weight, v_uncond, guidance_scale,
    )  # fmt: skip
    arguments = arguments._replace(v=arguments.v.detach(), v_uncond=detached(arguments.v_uncond))
    *outputs, grad_v, grad_uncond = torch.ops.flowgrove.grpo_loss_and_grad(
        torch.ones((), dtype=x.dtype, device=x.device), *arguments
    )
    return GRPOLoss(*outputs), grad_v, None if v_uncond is None else grad_uncond
