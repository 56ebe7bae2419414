"""grpo_loss: sums per block, scalars per edge, the loss, and with grad_loss the gradient: one launch each.

The launch of the scalars adds up the loss too where it is a single program.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.backends import implements
from flowgrove_kernels.layout import fp32, optional_rows, rows_of
from flowgrove_kernels.loss_arguments import LossArguments
from flowgrove_kernels.triton.combine import ROWS, edges_of, pairwise, row_totals
from flowgrove_kernels.triton.element import children, fold, guided, log_probability, place, require_one_step, step_mean
from flowgrove_kernels.triton.gradient import pull_strength, velocity_gradient
from flowgrove_kernels.triton.launch import blocks_of, launch, offsets_of, row_stride
from flowgrove_kernels.triton.normal import edge_normals, key_words, require_words


@triton.jit
def sums_kernel(
    p_x, p_v, p_uncond, p_next, p_ref, p_noise, p_key, p_x_coef, p_v_coef, p_prev_coef, p_std, p_offsets,
    p_squares, p_products, p_drifts, p_parent,
    s_x, s_v, s_uncond, s_next, s_ref, s_noise, s_word, s_key, guidance, shared, own, fanout, edges, blocks, D,
    CORRELATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a parent.

    Σ r² → squares [E, blocks]; guard: Σ z⊙(s·z − r) → products [E, blocks]; KL: Σ (v − v_ref)² → drifts [B, blocks].
    """
    i_parent, i_block, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_v = guided(p_v, s_v, p_uncond, s_uncond, guidance, i_parent, start, o_lane, m_lane)
    if p_ref is not None:
        b_drift = b_v - tl.load(p_ref + i_parent * s_ref + start + o_lane, mask=m_lane, other=0.0).to(tl.float32)
        tl.store(p_drifts + i_parent * blocks + i_block, fold(b_drift * b_drift))
    b_mean = step_mean(p_x, s_x, p_x_coef, p_v_coef, b_v, i_parent, start, o_lane, m_lane)
    std = tl.load(p_std + i_parent)
    first, last = children(p_offsets, fanout, i_parent, i_block, blocks, edges, BLOCK)
    for i_edge in range(first, last):
        b_next = tl.load(p_next + i_edge * s_next + start + o_lane, mask=m_lane, other=0.0)
        b_residual = tl.where(m_lane, b_next - b_mean, 0.0)
        tl.store(p_squares + i_edge * blocks + i_block, fold(b_residual * b_residual))
        tl.store(p_parent + i_edge, i_parent, mask=i_block == 0)
        if p_products is not None:
            if p_noise is not None:
                b_z = tl.load(p_noise + i_edge * s_noise + start + o_lane, mask=m_lane, other=0.0)
            else:
                b_z = edge_normals(p_key, s_word, s_key, i_edge, i_block, shared, own, CORRELATED, False, BLOCK)
            b_product = tl.where(m_lane, b_z * tl.fma(std, b_z, -b_residual), 0.0)
            tl.store(p_products + i_edge * blocks + i_block, fold(b_product))
        elif p_key is not None:  # only the gradient needs the noise
            seed, iteration, step, prompt, node, parent = key_words(p_key, s_word, s_key, i_edge)
            require_words(seed, iteration, step, prompt, node, parent, i_block, CORRELATED, BLOCK)
    require_one_step(p_prev_coef, i_parent, i_block, BLOCK)


@triton.jit
def scores_kernel(
    p_squares, p_products, p_drifts, p_parent, p_v_coef, p_std, p_precision, p_log_norm, p_old, p_advantage, p_weight,
    p_logp, p_ratio, p_clipped, p_kl, p_term, p_loss, p_score, low, high, kl_weight, edges, blocks, D,
):  # fmt: skip
    """What depends on the sums of ROWS edges.
    term: their parts of the loss, unless p_loss takes it; score: ∂loss/∂log ρ, 0 where the clip removes it.
    """
    o_edge, m_edge = edges_of(edges)
    o_parent = tl.load(p_parent + o_edge, mask=m_edge, other=0)
    precision = tl.load(p_precision + o_parent, mask=m_edge, other=0.0)
    log_norm = tl.load(p_log_norm + o_parent, mask=m_edge, other=0.0)
    logp = log_probability(row_totals(p_squares, o_edge, m_edge, blocks), precision, log_norm, D)
    tl.store(p_logp + o_edge, logp, mask=m_edge)

    elements = tl.maximum(D, 1).to(tl.float64)
    ratio = tl.full((ROWS,), 1.0, tl.float32)
    if p_products is not None:
        ratio = tl.exp(row_totals(p_products, o_edge, m_edge, blocks) / elements).to(tl.float32)
    elif p_old is not None:
        change = logp - tl.load(p_old + o_edge, mask=m_edge, other=0.0)
        ratio = tl.exp(change.to(tl.float64)).to(tl.float32)  # in fp32 tl.exp is approximate
    low, high = tl.full((), low, tl.float32), tl.full((), high, tl.float32)
    above, below = ratio > high, ratio < low
    tl.store(p_ratio + o_edge, ratio, mask=m_edge)
    tl.store(p_clipped + o_edge, above.to(tl.int8) - below.to(tl.int8), mask=m_edge)

    kl = tl.zeros((ROWS,), tl.float32)
    if p_drifts is not None:
        b, std = tl.load(p_v_coef + o_parent, mask=m_edge, other=0.0), tl.load(p_std + o_parent, mask=m_edge, other=0.0)
        kl = pull_strength(b, std) * (row_totals(p_drifts, o_parent, m_edge, blocks) / elements).to(tl.float32)
    tl.store(p_kl + o_edge, kl, mask=m_edge)

    advantage = tl.load(p_advantage + o_edge, mask=m_edge, other=0.0)
    weight = tl.load(p_weight + o_edge, mask=m_edge, other=0.0)
    plain, bounded = -advantage * ratio, -advantage * tl.where(above, high, tl.where(below, low, ratio))
    surrogate = tl.where(plain < bounded, bounded, plain).to(tl.float64)  # NaN if `plain` is
    removed = ((advantage > 0) & above) | ((advantage < 0) & below)
    tl.store(p_score + o_edge, tl.where(removed, 0.0, -weight * advantage * ratio), mask=m_edge)
    term = weight.to(tl.float64) * (surrogate + tl.full((), kl_weight, tl.float64) * kl.to(tl.float64))
    if p_loss is None:
        tl.store(p_term + o_edge, term, mask=m_edge)
    else:
        total = pairwise(tl.reshape(tl.where(m_edge, term, 0.0), (1, ROWS)))
        tl.store(p_loss + tl.arange(0, 1), total.to(tl.float32))


@triton.jit
def loss_kernel(p_term, p_loss, edges):
    """One program: the sum of float64 terms [E]."""
    o_only = tl.arange(0, 1)
    tl.store(p_loss + o_only, row_totals(p_term, o_only, o_only == 0, edges).to(tl.float32))


@implements("grpo_loss", "triton")
def grpo_loss(grad_loss: Tensor | None, *arguments: Any) -> list[Tensor]:
    """Outputs and, with grad_loss (a scalar that scales them), gradients, as the reference returns them."""
    given = LossArguments(*arguments)
    edges, shape = given.x_next.shape[0], tuple(given.v.shape)
    guidance_scale, correlation, key = given.guidance_scale, given.sibling_correlation, given.key
    x, v, x_next = rows_of(given.x), rows_of(given.v), rows_of(given.x_next)
    v_ref, v_uncond, noise = optional_rows(given.v_ref), optional_rows(given.v_uncond), optional_rows(given.noise)
    x_coef, v_coef, std = fp32(given.x_coef), fp32(given.v_coef), fp32(given.std)
    precision, log_norm = fp32(given.precision), fp32(given.log_norm)
    advantage, weight = fp32(given.advantage), fp32(given.weight)
    old_logp = None if given.old_logp is None else fp32(given.old_logp)
    batch, elements = x.shape
    offsets, cut = offsets_of(given.child_offsets, batch, edges), blocks_of(elements)
    squares, parent = x.new_empty((edges, cut.number)), x.new_empty(edges, dtype=torch.int64)
    products = x.new_empty((edges, cut.number)) if given.guard and old_logp is not None else None
    drifts = None if v_ref is None else x.new_empty((batch, cut.number))
    launch(
        sums_kernel, batch * cut.number, cut.warps, x, x, v, v_uncond, x_next, v_ref, noise, key, x_coef, v_coef,
        fp32(given.prev_coef), std, offsets, squares, products, drifts, parent,
        *(row_stride(t) for t in (x, v, v_uncond, x_next, v_ref, noise)), *((0, 0) if key is None else key.stride()),
        guidance_scale, math.sqrt(correlation), math.sqrt(1 - correlation), given.fanout, edges, cut.number, elements,
        CORRELATED=correlation > 0, BLOCK=cut.size,
    )  # fmt: skip

    loss, logp, ratio, kl, score = x.new_empty(()), *(x.new_empty(edges) for _ in range(4))
    clipped, programs = x.new_empty(edges, dtype=torch.int8), -(-edges // ROWS.value)
    term = None if programs == 1 else x.new_empty(edges, dtype=torch.float64)
    launch(
        scores_kernel, programs, 4, x, squares, products, drifts, parent, v_coef, std, precision, log_norm, old_logp,
        advantage, weight, logp, ratio, clipped, kl, term, loss if term is None else None, score,
        1 - given.clip_low, 1 + given.clip_high, given.kl_weight, edges, cut.number, elements,
    )  # fmt: skip
    if term is not None:
        launch(loss_kernel, 1, 1, x, term, loss, edges)
    if grad_loss is None:
        return [loss, logp, ratio, clipped, kl]
    gradients = velocity_gradient(
        x, v, v_uncond, x_next, v_ref, noise, key, x_coef, v_coef, std, precision, score, weight, fp32(grad_loss),
        offsets, shape, guard=given.guard, fanout=given.fanout, sibling_correlation=correlation,
        kl_weight=given.kl_weight, guidance_scale=guidance_scale,
    )  # fmt: skip
    return [loss, logp, ratio, clipped, kl, *gradients]
