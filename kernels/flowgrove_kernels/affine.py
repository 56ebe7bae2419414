"""The arithmetic that the ops share: one mean, one residual, one sum, so that all of them return
the same log-probability to the last bit.

Only single multiplications and additions touch the elements, each correctly rounded, and sums fold
in an order fixed by their length alone.
So a result does not depend on batch size, order, fanout, strides or device.
"""

import torch
from torch import Tensor

from flowgrove_kernels.checks import require_offsets


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 states, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def guided(v: Tensor, v_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """v_uncond + γ·(v − v_uncond), or v: [B, D] in `dtype`."""
    v = v.to(dtype)
    if v_uncond is None:
        return v
    v_uncond = v_uncond.to(dtype)
    return v_uncond + guidance_scale * (v - v_uncond)


def step_mean(
    x: Tensor, v: Tensor, x_coef: Tensor, v_coef: Tensor, prev_coef: Tensor, history: Tensor | None
) -> Tensor:
    """μ = a·x + b·v + c·p, [B, D]."""
    mean = column(x_coef, x) * x + column(v_coef, x) * v
    return mean if history is None else mean + column(prev_coef, x) * history


def log_probability(residual: Tensor, precision: Tensor, log_norm: Tensor) -> Tensor:
    """log_norm − κ·mean_D residual²: residual [E, D] → [E]."""
    return log_norm.to(residual.dtype) - precision.to(residual.dtype) * mean_over_elements(residual * residual)


def mean_over_elements(values: Tensor) -> Tensor:
    """[E, D] → [E]."""
    return fold_sum(values) / max(values.shape[1], 1)


def fold_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension by adding its halves until one is left."""
    while (width := values.shape[-1]) > 1:
        half = (width + 1) // 2
        folded = values[..., : width - half] + values[..., half:]
        values = folded if width % 2 == 0 else torch.cat([folded, values[..., half - 1 : half]], dim=-1)
    return values.sum(-1)  # one element or none


def column(rows: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1] in the dtype of `like`."""
    return rows.to(like.dtype).unsqueeze(1)


def children_of(
    child_offsets: Tensor | None, parents: int, fanout: int, edges: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(parent of every edge int64 [E], CSR offsets int64 [B + 1])."""
    require_offsets(child_offsets, edges)
    if child_offsets is None:
        child_offsets = torch.arange(parents + 1, device=device) * fanout
    parent = torch.repeat_interleave(torch.arange(parents, device=device), child_offsets.diff(), output_size=edges)
    return parent, child_offsets
