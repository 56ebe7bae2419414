"""The gradient in the velocity, added up over the children of a state: the backward of
flow_logprob and the last stage of grpo_loss.

    ∂/∂v = Σ_children c_e·(x'_e − μ) + Σ_children 2β·w_e·b²(v − v_ref)/(2s²D)        c_e = score_e·2κb/D

Guard: c_e·z_e with c_e = score_e·b/D. score_e is what comes from above to log ρ_e, or to logp_e.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.triton.element import children, guided, inner, place, step_mean, store
from flowgrove_kernels.triton.launch import blocks_of, launch, row_stride
from flowgrove_kernels.triton.normal import edge_normals


@inner
def pull_strength(b, std):
    """b²/(2s²): what KL multiplies the mean squared drift by; 0 where a step has no noise."""
    return tl.where(std > 0, tl.div_rn(b * b, tl.where(std > 0, 2.0 * (std * std), 1.0)), 0.0)


@triton.jit
def gradient_kernel(
    p_x, p_v, p_uncond, p_next, p_ref, p_noise, p_key, p_x_coef, p_v_coef, p_std, p_precision,
    p_score, p_weight, p_scale, p_offsets, p_grad, p_grad_uncond,
    s_x, s_v, s_uncond, s_next, s_ref, s_noise, s_word, s_key,
    guidance, shared, own, kl_weight, fanout, edges, blocks, D,
    GUARD: tl.constexpr, CORRELATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a parent; children are added in order.
    score, weight: fp32 [E]; scale: multiplies everything. The key has been checked.
    """
    i_parent, i_block, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_v = guided(p_v, s_v, p_uncond, s_uncond, guidance, i_parent, start, o_lane, m_lane)
    b, scale = tl.load(p_v_coef + i_parent), 1.0
    if p_scale is not None:
        scale = tl.load(p_scale)
    if GUARD:
        slope = b * scale
    else:
        slope = 2.0 * tl.load(p_precision + i_parent) * b * scale
        b_mean = step_mean(p_x, s_x, p_x_coef, p_v_coef, b_v, i_parent, start, o_lane, m_lane)
    elements = tl.maximum(D, 1).to(tl.float32)
    slope = tl.div_rn(slope, elements)

    b_grad, total_weight = (
        tl.where(m_lane, 0.0, b_v),
        0.0,
    )  # zeros, laid out as v is: others would lie so that every child's noise had to move
    first, last = children(p_offsets, fanout, i_parent, i_block, blocks, edges, BLOCK)
    for i_edge in range(first, last):
        if not GUARD:
            b_next = tl.load(p_next + i_edge * s_next + start + o_lane, mask=m_lane, other=0.0)
            b_term = tl.where(m_lane, b_next - b_mean, 0.0)
        elif p_noise is not None:
            b_term = tl.load(p_noise + i_edge * s_noise + start + o_lane, mask=m_lane, other=0.0)
        else:
            b_term = edge_normals(p_key, s_word, s_key, i_edge, i_block, shared, own, CORRELATED, True, BLOCK)
        b_grad = tl.fma(tl.load(p_score + i_edge) * slope, b_term, b_grad)
        if p_ref is not None:
            total_weight += tl.load(p_weight + i_edge)
    if p_ref is not None:
        pull = (
            2.0
            * tl.full((), kl_weight, tl.float32)
            * total_weight
            * scale
            * pull_strength(b, tl.load(p_std + i_parent))
        )
        b_drift = b_v - tl.load(p_ref + i_parent * s_ref + start + o_lane, mask=m_lane, other=0.0).to(tl.float32)
        b_grad = tl.fma(tl.div_rn(pull, elements), b_drift, b_grad)

    if p_uncond is None:
        store(p_grad + i_parent * D + start, o_lane, m_lane, b_grad)
    else:
        gamma = tl.full((), guidance, tl.float32)
        store(p_grad + i_parent * D + start, o_lane, m_lane, gamma * b_grad)
        store(p_grad_uncond + i_parent * D + start, o_lane, m_lane, (1.0 - gamma) * b_grad)


def velocity_gradient(
    x: Tensor, v: Tensor, v_uncond: Tensor | None, x_next: Tensor, v_ref: Tensor | None, noise: Tensor | None,
    key: Tensor | None, x_coef: Tensor, v_coef: Tensor, std: Tensor | None, precision: Tensor, score: Tensor,
    weight: Tensor | None, scale: Tensor | None, child_offsets: Tensor | None, shape: tuple[int, ...],
    *, guard: bool, fanout: int, sibling_correlation: float, kl_weight: float, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of v and v_uncond (empty without guidance), in `shape` and the dtype of v.
    Tensors as the kernels see them: rows, fp32 coefficients.
    """
    batch, elements = x.shape
    cut = blocks_of(elements)
    grad_v = v.new_empty(shape)
    grad_uncond = v.new_empty(0 if v_uncond is None else shape)
    launch(
        gradient_kernel, batch * cut.number, cut.warps, x, x, v, v_uncond, x_next, v_ref, noise, key,
        x_coef, v_coef, std, precision, score, weight, scale, child_offsets,
        grad_v, None if v_uncond is None else grad_uncond,
        *(row_stride(t) for t in (x, v, v_uncond, x_next, v_ref, noise)), *((0, 0) if key is None else key.stride()),
        guidance_scale, math.sqrt(sibling_correlation), math.sqrt(1 - sibling_correlation), kl_weight, fanout,
        x_next.shape[0], cut.number, elements,
        GUARD=guard, CORRELATED=sibling_correlation > 0, BLOCK=cut.size,
    )  # fmt: skip
    return grad_v, grad_uncond
