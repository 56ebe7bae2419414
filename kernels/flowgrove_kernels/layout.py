"""How the fused backends see tensors: rows whose elements lie side by side, at any distance from each other."""

from typing import TypeVar

import torch
from torch import Tensor

_V = TypeVar("_V", Tensor, Tensor | None)


def rows_of(value: Tensor) -> Tensor:
    """[B, ...] → [B, D] with element stride 1: a view wherever the layout allows one
    (any row stride, 0 included), else a copy.
    """
    flat = value if value.ndim == 2 else value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def optional_rows(value: Tensor | None) -> Tensor | None:
    """`rows_of`, of None too."""
    return None if value is None else rows_of(value)


def fp32(value: Tensor) -> Tensor:
    """Coefficients or scores [B] as contiguous fp32."""
    if value.dtype == torch.float32 and value.is_contiguous():  # the usual case, without two calls that change nothing
        return value
    return value.to(torch.float32).contiguous()


def fused_velocity(v: _V) -> _V:
    """A velocity as the kernels take it: fp32, bf16 or fp16; a float64 one is rounded to fp32."""
    return v.to(torch.float32) if v is not None and v.dtype == torch.float64 else v
