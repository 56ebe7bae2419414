"""What one block of a row goes through in every kernel: the arithmetic that makes
log-probabilities the same bits in all ops.

    v = fma(γ, v − u, u)        μ = fma(c, p, fma(b, v, a·x))        r = x' − μ        logp = log_norm − κ·(Σ r²/D)

Everything is fp32 and rounded as written. The order of a sum is written out too: tl.sum over more
than two values leaves it to the layout, which the compiler chooses from the loads around it and
which therefore differs between kernels.
"""

import os
from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def inner(function: Any) -> Any:
    """Decorator of functions that kernels call.
    The interpreter runs them as plain Python: it would prepare each call of a jit function for a millisecond.
    """
    return function if INTERPRETED else triton.jit(function)


@inner
def place(blocks, D, BLOCK: tl.constexpr):
    """This program's row int64, its block int32, the block's first element int64, its lanes
    [BLOCK] and which of them lie in the row.

    Lanes claim to be contiguous by fours only: with eight bf16 per thread, what meets fp32 and
    noise would have to move between threads.
    """
    i_row = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = tl.program_id(0) % blocks
    start = i_block.to(tl.int64) * BLOCK
    o_lane = tl.max_contiguous(tl.arange(0, BLOCK), 4)
    return i_row, i_block, start, o_lane, o_lane < D - start


@inner
def require(right, message: tl.constexpr, BLOCK: tl.constexpr):
    """Unless the scalar `right` is true, one thread prints a line and the process can use its GPU no more."""
    if right == 0:
        if INTERPRETED:
            raise RuntimeError(message)
        tl.device_assert(tl.arange(0, BLOCK) > 0, message)


@inner
def children(p_offsets, fanout, i_parent, i_block, blocks, edges, BLOCK: tl.constexpr):
    """The edges [first, last) of a parent, int64: `fanout` each, or from CSR offsets, which must rise from 0
    to `edges`. Wrong ones are never followed.
    """
    if p_offsets is None:
        first = i_parent * fanout
        last = first + fanout
    else:
        first = tl.load(p_offsets + i_parent)
        last = tl.load(p_offsets + i_parent + 1)
        rising = (first >= 0) & (first <= last) & (last <= edges) & ((i_parent > 0) | (first == 0))
        rising = rising & ((last == edges) | (tl.program_id(0) + blocks < tl.num_programs(0)))  # the last parent's end
        require(rising | (i_block > 0), "child_offsets must rise from 0 to the number of rows of x_next", BLOCK)
        last = tl.where(rising, last, first)
    return first, last


@inner
def store(p_row, o_lane, m_lane, value):
    """Rounds to the dtype of the row, to nearest even."""
    if INTERPRETED and p_row.dtype.element_ty == tl.bfloat16:  # the interpreter cuts the low bits off
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(p_row + o_lane, value.to(p_row.dtype.element_ty), mask=m_lane)


@inner
def guided(p_v, s_v, p_uncond, s_uncond, guidance, i_row, start, o_lane, m_lane):
    """The velocity [BLOCK] in fp32, mixed with the unconditional one if there is one."""
    b_v = tl.load(p_v + i_row * s_v + start + o_lane, mask=m_lane, other=0.0).to(tl.float32)
    if p_uncond is not None:
        b_uncond = tl.load(p_uncond + i_row * s_uncond + start + o_lane, mask=m_lane, other=0.0).to(tl.float32)
        b_v = tl.fma(tl.full((), guidance, tl.float32), b_v - b_uncond, b_uncond)
    return b_v


@inner
def step_mean(p_x, s_x, p_x_coef, p_v_coef, b_v, i_row, start, o_lane, m_lane):
    """μ [BLOCK] without history: fma(b, v, a·x)."""
    b_x = tl.load(p_x + i_row * s_x + start + o_lane, mask=m_lane, other=0.0)
    return tl.fma(tl.load(p_v_coef + i_row), b_v, tl.load(p_x_coef + i_row) * b_x)


@inner
def require_one_step(p_prev_coef, i_row, i_block, BLOCK: tl.constexpr):
    """Rows that take no history have none to add. Called last: nothing waits for it."""
    message: tl.constexpr = "these coefficients need history=, the previous clean estimate: prev_coef is not 0"
    require((tl.load(p_prev_coef + i_row) == 0) | (i_block > 0), message, BLOCK)


@triton.jit
def _add(left, right):
    return left + right


ADD = (
    tl.standard._sum_combine if INTERPRETED else _add
)  # the interpreter adds whole axes with its own, and single numbers with any other


@inner
def fold(values):
    """Sum of [N], N a power of two from 4 to 2¹⁷: the four quarters first, which lie in one thread, then neighbours.
    Each reduction adds two numbers.
    """
    for _ in tl.static_range(2):
        values = tl.reduce(tl.reshape(values, (2, values.shape[0] // 2)), 0, ADD)
    for _ in tl.static_range(14):
        if values.shape[0] > 2:
            values = tl.reduce(tl.reshape(values, (values.shape[0] // 2, 2)), 1, ADD)
    return tl.reduce(values, 0, ADD)


@inner
def log_probability(total, precision, log_norm, D):
    """log_norm − κ·(Σ r²/D) of one row, rounded to fp32 once. total: float64."""
    mean = total / tl.maximum(D, 1).to(tl.float64)
    return (log_norm.to(tl.float64) - precision.to(tl.float64) * mean).to(tl.float32)
