"""The clipped GRPO loss of E edges and its gradient with respect to the velocity.

    log ρ_e = logp_new − logp_old                                    ("density")
    log ρ_e = s·mean z² − mean z⊙(x' − μ)                            ("guard": mean z⊙Δμ, from the step's own noise z)
    L_e     = max(−A_e·ρ_e, −A_e·clip(ρ_e, 1−ε_lo, 1+ε_hi))
    KL_e    = b²·mean_D (v − v_ref)²/(2s²)
    loss    = Σ_e w_e·L_e + β·Σ_e w_e·KL_e

    ∂loss/∂v = Σ_children c_e·(x'_e − μ) + Σ_children 2β·w_e·b²(v − v_ref)/(2s²D),   c_e = −w_e·A_e·ρ_e·[gradient kept]·2κb/D
    guard: c_e·(x'_e − μ) becomes −w_e·A_e·ρ_e·[gradient kept]·b·z/D

The clip removes the gradient iff (A > 0 and ρ > 1+ε_hi) or (A < 0 and ρ < 1−ε_lo). Sources: GRPO (2402.03300), Flow-GRPO (2505.05470).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flowgrove_kernels.affine import children_of, column, fold_sum, guided, log_probability, mean_over_elements, working_dtype
from flowgrove_kernels.backends import implementation, implements
from flowgrove_kernels.checks import check_coefficients, check_correlation, check_edges, check_like, check_state, check_velocity, detached
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.flow_logprob import residual_of, split_guidance, sum_children
from flowgrove_kernels.noise import NoiseKey, given_or_drawn


class GRPOLoss(NamedTuple):
    """loss: scalar; logp, ratio, kl: [E]; clipped: int8 [E], −1 where ρ < 1−ε_lo, +1 where ρ > 1+ε_hi, else 0, whatever the sign of A."""

    loss: Tensor
    logp: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


@implements("grpo_loss", "reference")
def _reference(
    grad_loss: Tensor | None, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, std: Tensor, precision: Tensor, log_norm: Tensor,
    old_logp: Tensor | None, advantage: Tensor, weight: Tensor, child_offsets: Tensor | None, key: Tensor | None, noise: Tensor | None,
    v_ref: Tensor | None, v_uncond: Tensor | None, guard: bool, clip_low: float, clip_high: float, fanout: int,
    sibling_correlation: float, kl_weight: float, guidance_scale: float,
) -> list[Tensor]:  # fmt: skip
    """loss, logp, ratio, clipped, kl; and, with grad_loss (a scalar that scales them), the gradients of v and v_uncond."""
    dtype = working_dtype(x)
    parent, offsets = children_of(child_offsets, x.shape[0], fanout, x_next.shape[0], x.device)
    residual = residual_of(x, v, x_next, x_coef, v_coef, v_uncond, guidance_scale, parent)  # [E, D]
    elements = max(residual.shape[1], 1)
    advantage, weight = advantage.to(dtype), weight.to(dtype)
    slope, std, precision = v_coef.to(dtype)[parent], std.to(dtype)[parent], precision[parent]
    logp = log_probability(residual, precision, log_norm[parent])

    z = None
    if guard:
        z = given_or_drawn(noise, key, residual.shape, sibling_correlation).to(dtype)
    if old_logp is None:
        ratio = torch.ones_like(logp)
    elif z is not None:
        ratio = torch.exp(std * mean_over_elements(z * z) - mean_over_elements(z * residual))
    else:
        ratio = torch.exp(logp - old_logp.to(dtype))
    above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
    clipped = above.to(torch.int8) - below.to(torch.int8)
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    loss = fold_sum(weight * surrogate)

    kl, pull, drift = torch.zeros_like(logp), None, None
    if v_ref is not None:
        flat = (x.shape[0], residual.shape[1])
        uncond = None if v_uncond is None else v_uncond.reshape(flat)
        drift = guided(v.reshape(flat), uncond, guidance_scale, dtype) - v_ref.reshape(flat).to(dtype)  # [B, D]
        pull = torch.where(std > 0, slope.square() / (2 * std.square()), 0.0)  # b²/(2s²), 0 where a step has no noise
        kl = pull * mean_over_elements(drift * drift)[parent]
        loss = loss + kl_weight * fold_sum(weight * kl)
    if grad_loss is None:
        return [loss, logp, ratio, clipped, kl]

    kept = ~((advantage > 0) & above | (advantage < 0) & below)
    push = torch.where(kept, -weight * advantage * ratio * slope / elements, 0.0) * grad_loss.to(dtype)
    edge_grad = column(push, residual) * z if z is not None else column(push * 2 * precision.to(dtype), residual) * residual
    if pull is not None and drift is not None:
        edge_grad = edge_grad + column(2 * kl_weight * weight * pull / elements * grad_loss.to(dtype), residual) * drift[parent]
    return [loss, logp, ratio, clipped, kl, *split_guidance(sum_children(edge_grad, offsets), v, v_uncond, guidance_scale)]


@torch.library.custom_op("flowgrove::grpo_loss", mutates_args=())
def _op(
    x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, std: Tensor, precision: Tensor, log_norm: Tensor,
    old_logp: Tensor | None, advantage: Tensor, weight: Tensor, child_offsets: Tensor | None, key: Tensor | None, noise: Tensor | None,
    v_ref: Tensor | None, v_uncond: Tensor | None, guard: bool, clip_low: float, clip_high: float, fanout: int,
    sibling_correlation: float, kl_weight: float, guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, logp, ratio, clipped, kl = implementation("grpo_loss", x)(
        None, x, v, x_next, x_coef, v_coef, std, precision, log_norm, old_logp, advantage, weight, child_offsets, key, noise, v_ref, v_uncond,
        guard, clip_low, clip_high, fanout, sibling_correlation, kl_weight, guidance_scale,
    )  # fmt: skip
    return loss, logp, ratio, clipped, kl


@torch.library.custom_op("flowgrove::grpo_loss_and_grad", mutates_args=())
def _op_and_grad(
    grad_loss: Tensor, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, std: Tensor, precision: Tensor, log_norm: Tensor,
    old_logp: Tensor | None, advantage: Tensor, weight: Tensor, child_offsets: Tensor | None, key: Tensor | None, noise: Tensor | None,
    v_ref: Tensor | None, v_uncond: Tensor | None, guard: bool, clip_low: float, clip_high: float, fanout: int,
    sibling_correlation: float, kl_weight: float, guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, logp, ratio, clipped, kl, grad_v, grad_uncond = implementation("grpo_loss", x)(
        grad_loss, x, v, x_next, x_coef, v_coef, std, precision, log_norm, old_logp, advantage, weight, child_offsets, key, noise, v_ref, v_uncond,
        guard, clip_low, clip_high, fanout, sibling_correlation, kl_weight, guidance_scale,
    )  # fmt: skip
    return loss, logp, ratio, clipped, kl, grad_v, grad_uncond


def _fake_outputs(x: Tensor, x_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    edges = x_next.shape[0]
    return x.new_empty(()), x.new_empty(edges), x.new_empty(edges), x.new_empty(edges, dtype=torch.int8), x.new_empty(edges)


@_op.register_fake
def _(x, v, x_next, *others):
    return _fake_outputs(x, x_next)


@_op_and_grad.register_fake
def _(grad_loss, x, v, x_next, *others):
    v_uncond = others[12]
    return *_fake_outputs(x, x_next), v.new_empty(v.shape), v.new_empty((0,) if v_uncond is None else v.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:16])  # x … v_uncond
    ctx.constants = inputs[16:]
    ctx.set_materialize_grads(False)  # or autograd fills zeros for the four outputs that nobody differentiates


def _backward(ctx, grad_loss: Tensor | None, *unused: Tensor | None):
    if grad_loss is None:
        return (None,) * 23
    *_, grad_v, grad_uncond = torch.ops.flowgrove.grpo_loss_and_grad(grad_loss, *ctx.saved_tensors, *ctx.constants)
    grads: list[Tensor | None] = [None] * 23
    grads[1] = grad_v
    grads[15] = None if ctx.saved_tensors[15] is None else grad_uncond
    return tuple(grads)


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
    """Σ_e w_e·L_e + β·Σ_e w_e·KL_e over E edges; only `loss` is differentiable, in v and v_uncond.

    x: fp32 (or float64) [B, ...]; v: fp32, bf16, fp16 or float64, same shape; x_next [E, ...] in the dtype of x, children of a row contiguous: `fanout`
    each, or as many as `child_offsets` (int64 [B + 1], CSR) says. coef: B one-step rows. old_logp, advantage, weight: fp32 (or the dtype of x) [E];
    old_logp None: on-policy, ρ = 1 by stop-gradient. clip_range: ε or (ε_lo, ε_hi). ratio: "density", or "guard", which needs the noise of the steps:
    its `key` (and sibling_correlation) or `noise` itself. v_ref: the reference model's (guided) velocity [B, ...], with kl_weight β.
    Raises ValueError for other shapes, dtypes, devices or combinations.
    """
    arguments = _arguments(
        x, v, x_next, coef, old_logp, advantage, weight, clip_range, fanout, child_offsets, ratio, key, noise,
        sibling_correlation, v_ref, kl_weight, v_uncond, guidance_scale,
    )  # fmt: skip
    loss, *rest = torch.ops.flowgrove.grpo_loss(*arguments)
    return GRPOLoss(loss, *(t.detach() for t in rest))


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
    """`grpo_loss` and its gradients in one pass: (GRPOLoss, grad_v, grad_v_uncond or None), in the shape and dtype of v. Arguments as `grpo_loss`."""
    arguments = _arguments(
        x, v.detach(), x_next, coef, old_logp, advantage, weight, clip_range, fanout, child_offsets, ratio, key, noise,
        sibling_correlation, v_ref, kl_weight, detached(v_uncond), guidance_scale,
    )  # fmt: skip
    *outputs, grad_v, grad_uncond = torch.ops.flowgrove.grpo_loss_and_grad(torch.ones((), dtype=x.dtype, device=x.device), *arguments)
    return GRPOLoss(*outputs), grad_v, None if v_uncond is None else grad_uncond


def _arguments(
    x: Tensor, v: Tensor, x_next: Tensor, coef: StepCoefficients, old_logp: Tensor | None, advantage: Tensor, weight: Tensor,
    clip_range: float | tuple[float, float], fanout: int, child_offsets: Tensor | None, ratio: str, key: NoiseKey | None, noise: Tensor | None,
    sibling_correlation: float, v_ref: Tensor | None, kl_weight: float, v_uncond: Tensor | None, guidance_scale: float | None,
) -> tuple:  # fmt: skip
    """Checks everything and puts it in the order of the op's schema."""
    check_state(x)
    scale = check_velocity(x, v, v_uncond, guidance_scale)
    check_coefficients(coef, x)
    edges = check_edges(x, x_next, fanout, child_offsets)
    for name, value in (("old_logp", old_logp), ("advantage", advantage), ("weight", weight)):
        check_like(value, name, (edges,), x, (torch.float32, x.dtype))
    low, high = (clip_range, clip_range) if isinstance(clip_range, int | float) else clip_range
    if not (0 <= low <= 1 and high >= 0):
        raise ValueError(f"clip_range is {clip_range}: write a number in [0, 1] or a pair (low, high) with low in [0, 1] and high >= 0")
    if ratio not in ("density", "guard"):
        raise ValueError(f"ratio is {ratio!r}: write 'density' or 'guard'")
    if (ratio == "guard") != (key is not None or noise is not None) or (key is not None and noise is not None):
        raise ValueError("ratio='guard' needs key= or noise= (one of them), and only 'guard' takes them")
    check_like(noise, "noise", x_next.shape, x)
    correlation = check_correlation(sibling_correlation, key)
    check_like(v_ref, "v_ref", x.shape, x, (v.dtype, x.dtype, torch.float32))
    if kl_weight < 0 or (kl_weight > 0 and v_ref is None):
        raise ValueError(f"kl_weight is {kl_weight}: write a number >= 0, and pass v_ref= where it is positive")
    packed = None if key is None else key.pack(edges, x.device)
    return (
        x.detach(), v, x_next.detach(), coef.x_coef, coef.v_coef, coef.std, coef.precision, coef.log_norm, detached(old_logp), advantage.detach(),
        weight.detach(), child_offsets, packed, detached(noise), detached(v_ref), v_uncond, ratio == "guard", float(low), float(high), fanout,
        correlation, float(kl_weight), scale,
    )  # fmt: skip
