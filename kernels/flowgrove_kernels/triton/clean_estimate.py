"""clean_estimate: x̂0 = x − σ·v, with guidance."""

import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.backends import implements
from flowgrove_kernels.layout import fp32, optional_rows, rows_of
from flowgrove_kernels.triton.element import guided, place, store
from flowgrove_kernels.triton.launch import blocks_of, launch, row_stride


@triton.jit
def estimate_kernel(p_x, p_v, p_uncond, p_sigma, p_out, s_x, s_v, s_uncond, guidance, blocks, D, BLOCK: tl.constexpr):
    i_row, _, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_v = guided(p_v, s_v, p_uncond, s_uncond, guidance, i_row, start, o_lane, m_lane)
    b_x = tl.load(p_x + i_row * s_x + start + o_lane, mask=m_lane, other=0.0)
    store(p_out + i_row * D + start, o_lane, m_lane, tl.fma(-tl.load(p_sigma + i_row), b_v, b_x))


@implements("clean_estimate", "triton")
def clean_estimate(x: Tensor, v: Tensor, sigma: Tensor, v_uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """x̂0 [B, ...] fp32; sigma [B]."""
    rows, velocity, uncond = rows_of(x), rows_of(v), optional_rows(v_uncond)
    batch, elements = rows.shape
    cut, out = blocks_of(elements), x.new_empty(x.shape)
    launch(
        estimate_kernel, batch * cut.number, cut.warps, x, rows, velocity, uncond, fp32(sigma), out,
        row_stride(rows), row_stride(velocity), row_stride(uncond), guidance_scale, cut.number, elements,
        BLOCK=cut.size,
    )  # fmt: skip
    return out
