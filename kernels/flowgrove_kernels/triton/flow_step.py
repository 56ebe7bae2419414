"""flow_step: one launch reads x, v and history once for all children of a row, draws their
noise and writes x' and the sums of logp.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.backends import implements
from flowgrove_kernels.layout import fp32, optional_rows, rows_of
from flowgrove_kernels.triton.combine import LogProbability, note_squares
from flowgrove_kernels.triton.element import guided, place, require_one_step, step_mean, store
from flowgrove_kernels.triton.launch import blocks_of, launch, row_stride
from flowgrove_kernels.triton.normal import edge_normals


@triton.jit
def step_kernel(
    p_x, p_v, p_uncond, p_history, p_noise, p_key, p_x_coef, p_v_coef, p_prev_coef, p_std, p_precision, p_log_norm,
    p_next, p_logp, p_partial, p_parent, s_x, s_v, s_uncond, s_history, s_noise, s_word, s_key,
    guidance, shared, own, fanout, blocks, D, CORRELATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a parent."""
    i_parent, i_block, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_v = guided(p_v, s_v, p_uncond, s_uncond, guidance, i_parent, start, o_lane, m_lane)
    b_mean = step_mean(p_x, s_x, p_x_coef, p_v_coef, b_v, i_parent, start, o_lane, m_lane)
    if p_history is not None:
        b_history = tl.load(p_history + i_parent * s_history + start + o_lane, mask=m_lane, other=0.0)
        b_mean = tl.fma(tl.load(p_prev_coef + i_parent), b_history, b_mean)
    std, precision, log_norm = (
        tl.load(p_std + i_parent),
        tl.load(p_precision + i_parent),
        tl.load(p_log_norm + i_parent),
    )
    for i_child in range(fanout):
        i_edge = i_parent * fanout + i_child
        b_next = b_mean
        if p_noise is not None:
            b_z = tl.load(p_noise + i_edge * s_noise + start + o_lane, mask=m_lane, other=0.0)
            b_next = tl.fma(std, b_z, b_mean)
        elif p_key is not None:
            b_z = edge_normals(p_key, s_word, s_key, i_edge, i_block, shared, own, CORRELATED, False, BLOCK)
            b_next = tl.fma(std, b_z, b_mean)
        store(p_next + i_edge * D + start, o_lane, m_lane, b_next)
        b_residual = tl.where(m_lane, b_next - b_mean, 0.0)
        note_squares(p_logp, p_partial, p_parent, b_residual, precision, log_norm, i_edge, i_parent, i_block, blocks, D)
    if p_history is None:
        require_one_step(p_prev_coef, i_parent, i_block, BLOCK)


@implements("flow_step", "triton")
def flow_step(
    x: Tensor, v: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, std: Tensor, precision: Tensor,
    log_norm: Tensor, key: Tensor | None, noise: Tensor | None, history: Tensor | None, v_uncond: Tensor | None,
    fanout: int, sibling_correlation: float, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x_next [B·fanout, ...], logp [B·fanout]), fp32."""
    rows, velocity, uncond, previous, given = (
        rows_of(x),
        rows_of(v),
        optional_rows(v_uncond),
        optional_rows(history),
        optional_rows(noise),
    )
    batch, elements = rows.shape
    cut, edges = blocks_of(elements), batch * fanout
    x_next, scores = x.new_empty((edges, *x.shape[1:])), LogProbability.empty(edges, cut, x)
    precision, log_norm = fp32(precision), fp32(log_norm)
    launch(
        step_kernel, batch * cut.number, cut.warps, x, rows, velocity, uncond, previous, given, key,
        fp32(x_coef), fp32(v_coef), fp32(prev_coef), fp32(std), precision, log_norm, x_next, *scores,
        *(row_stride(t) for t in (rows, velocity, uncond, previous, given)), *((0, 0) if key is None else key.stride()),
        guidance_scale, math.sqrt(sibling_correlation), math.sqrt(1 - sibling_correlation), fanout,
        cut.number, elements,
        CORRELATED=sibling_correlation > 0, BLOCK=cut.size,
    )  # fmt: skip
    return x_next, scores.finish(precision, log_norm, elements)
