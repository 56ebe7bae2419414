"""The second stage of a sum: from one number per block to one per row, added in float64
in an order fixed by the number of blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowgrove_kernels.triton.element import ADD, fold, inner, log_probability
from flowgrove_kernels.triton.launch import Blocks, launch

ROWS, WIDTH = tl.constexpr(16), tl.constexpr(32)  # edges of a program, partial sums of each that it reads at a time


@inner
def edges_of(edges):
    """The edges of this program, int64 [ROWS], and which of them exist."""
    o_edge = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return o_edge, o_edge < edges


@inner
def pairwise(b_total):
    """Sums of the rows of [R, N], N a power of two from 2 to 2¹⁷: neighbours first."""
    for _ in tl.static_range(16):
        if b_total.shape[1] > 2:
            b_total = tl.reduce(tl.reshape(b_total, (b_total.shape[0], b_total.shape[1] // 2, 2)), 2, ADD)
    return tl.reduce(b_total, 1, ADD)


@inner
def row_totals(p_partial, o_row, m_row, blocks):
    """Float64 sums of rows o_row [R] of partial sums [..., blocks], in an order that depends on `blocks`
    alone; of a single one, exactly that one.
    """
    b_total = tl.zeros((o_row.shape[0], WIDTH), tl.float64)
    for i_first in range(0, blocks, WIDTH):
        o_block = i_first + tl.arange(0, WIDTH)
        mask = m_row[:, None] & (o_block < blocks)[None, :]
        b_total += tl.load(p_partial + o_row[:, None] * blocks + o_block[None, :], mask=mask, other=0.0).to(tl.float64)
    return pairwise(b_total)


@triton.jit
def logp_kernel(p_partial, p_parent, p_precision, p_log_norm, p_logp, edges, blocks, D):
    """One program per ROWS edges."""
    o_edge, m_edge = edges_of(edges)
    o_parent = tl.load(p_parent + o_edge, mask=m_edge, other=0)
    precision = tl.load(p_precision + o_parent, mask=m_edge, other=0.0)
    log_norm = tl.load(p_log_norm + o_parent, mask=m_edge, other=0.0)
    total = row_totals(p_partial, o_edge, m_edge, blocks)
    tl.store(p_logp + o_edge, log_probability(total, precision, log_norm, D), mask=m_edge)


class LogProbability(NamedTuple):
    """logp [E] on its way. A row of one block is finished by the first stage; longer ones leave `partial` [E,
    blocks] and the `parent` int64 of each edge.
    """

    logp: Tensor
    partial: Tensor | None
    parent: Tensor | None

    @staticmethod
    def empty(edges: int, cut: Blocks, like: Tensor) -> "LogProbability":
        """For `edges` rows cut as `cut`."""
        logp = like.new_empty(edges)
        if cut.number == 1:
            return LogProbability(logp, None, None)
        return LogProbability(logp, like.new_empty((edges, cut.number)), like.new_empty(edges, dtype=torch.int64))

    def finish(self, precision: Tensor, log_norm: Tensor, elements: int) -> Tensor:
        """logp [E]; precision, log_norm: fp32 [B]."""
        if self.partial is not None:
            edges, blocks = self.partial.shape
            programs = -(-edges // ROWS.value)
            launch(
                logp_kernel,
                programs,
                4,
                self.logp,
                self.partial,
                self.parent,
                precision,
                log_norm,
                self.logp,
                edges,
                blocks,
                elements,
            )
        return self.logp


@inner
def note_squares(p_logp, p_partial, p_parent, b_residual, precision, log_norm, i_edge, i_parent, i_block, blocks, D):
    """Stores what a block of r [BLOCK] gives: logp where the row has no other block, else the block's partial sum."""
    squares = fold(b_residual * b_residual)
    if p_partial is None:
        tl.store(p_logp + i_edge, log_probability(squares.to(tl.float64), precision, log_norm, D))
    else:
        tl.store(p_partial + i_edge * blocks + i_block, squares)
        tl.store(p_parent + i_edge, i_parent, mask=i_block == 0)
