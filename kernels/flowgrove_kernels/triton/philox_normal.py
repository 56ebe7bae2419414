"""philox_normal: the noise that a key names, written out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.backends import implements
from flowgrove_kernels.triton.element import place, store
from flowgrove_kernels.triton.launch import blocks_of, launch
from flowgrove_kernels.triton.normal import edge_normals


@triton.jit
def normal_kernel(p_key, p_out, s_word, s_key, blocks, D, BLOCK: tl.constexpr):
    i_row, i_block, start, o_lane, m_lane = place(blocks, D, BLOCK)
    b_z = edge_normals(p_key, s_word, s_key, i_row, i_block, None, None, False, False, BLOCK)
    store(p_out + i_row * D + start, o_lane, m_lane, b_z)


@implements("philox_normal", "triton")
def philox_normal(key: Tensor, elements: int) -> Tensor:
    """fp32 [rows, elements] for a packed key int64 [6, rows]."""
    rows, cut = key.shape[1], blocks_of(elements)
    out = key.new_empty((rows, elements), dtype=torch.float32)
    launch(
        normal_kernel, rows * cut.number, cut.warps, key, key, out, *key.stride(), cut.number, elements, BLOCK=cut.size
    )
    return out
