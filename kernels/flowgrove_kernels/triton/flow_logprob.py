"""flow_logprob: the log-probability of given steps, and its gradient in the velocity."""

import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.backends import implements
from flowgrove_kernels.layout import fp32, optional_rows, rows_of
from flowgrove_kernels.triton.combine import LogProbability, note_squares
from flowgrove_kernels.triton.element import children, guided, place, require_one_step, step_mean
from flowgrove_kernels.triton.gradient import velocity_gradient
from flowgrove_kernels.triton.launch import blocks_of, launch, offsets_of, row_stride


@triton.jit
def logprob_kernel(
    p_x, p_v, p_uncond, p_next, p_x_coef, p_v_coef, p_prev_coef, p_precision, p_log_norm, p_offsets, p_logp, p_partial,
    p_parent, s_x, s_v, s_uncond, s_next, guidance, fanout, edges, blocks, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of a parent."""
    i_parent, i_block, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_v = guided(p_v, s_v, p_uncond, s_uncond, guidance, i_parent, start, o_lane, m_lane)
    b_mean = step_mean(p_x, s_x, p_x_coef, p_v_coef, b_v, i_parent, start, o_lane, m_lane)
    precision, log_norm = tl.load(p_precision + i_parent), tl.load(p_log_norm + i_parent)
    first, last = children(p_offsets, fanout, i_parent, i_block, blocks, edges, BLOCK)
    for i_edge in range(first, last):
        b_next = tl.load(p_next + i_edge * s_next + start + o_lane, mask=m_lane, other=0.0)
        b_residual = tl.where(m_lane, b_next - b_mean, 0.0)
        note_squares(p_logp, p_partial, p_parent, b_residual, precision, log_norm, i_edge, i_parent, i_block, blocks, D)
    require_one_step(p_prev_coef, i_parent, i_block, BLOCK)


@implements("flow_logprob", "triton")
def flow_logprob(
    x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, precision: Tensor,
    log_norm: Tensor, child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> Tensor:  # fmt: skip
    """logp [E], fp32."""
    rows, velocity, uncond, reached = rows_of(x), rows_of(v), optional_rows(v_uncond), rows_of(x_next)
    (batch, elements), edges = rows.shape, x_next.shape[0]
    offsets, cut = offsets_of(child_offsets, batch, edges), blocks_of(elements)
    scores, precision, log_norm = LogProbability.empty(edges, cut, x), fp32(precision), fp32(log_norm)
    launch(
        logprob_kernel, batch * cut.number, cut.warps, x, rows, velocity, uncond, reached, fp32(x_coef), fp32(v_coef),
        fp32(prev_coef), precision, log_norm, offsets, *scores,
        *(row_stride(t) for t in (rows, velocity, uncond, reached)),
        guidance_scale, fanout, edges, cut.number, elements,
        BLOCK=cut.size,
    )  # fmt: skip
    return scores.finish(precision, log_norm, elements)


@implements("flow_logprob_backward", "triton")
def flow_logprob_backward(
    grad: Tensor, x: Tensor, v: Tensor, x_next: Tensor, x_coef: Tensor, v_coef: Tensor, precision: Tensor,
    child_offsets: Tensor | None, v_uncond: Tensor | None, fanout: int, guidance_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of v and v_uncond (empty without guidance) for grad [E]."""
    offsets = offsets_of(child_offsets, x.shape[0], x_next.shape[0])
    return velocity_gradient(
        rows_of(x), rows_of(v), optional_rows(v_uncond), rows_of(x_next), None, None, None,
        fp32(x_coef), fp32(v_coef), None, fp32(precision), fp32(grad), None, None, offsets, tuple(v.shape),
        guard=False, fanout=fanout, sibling_correlation=0.0, kl_weight=0.0, guidance_scale=guidance_scale,
    )  # fmt: skip
