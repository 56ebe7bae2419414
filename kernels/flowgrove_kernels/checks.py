"""Argument checks of the ops: each names the argument and says what to pass instead."""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from flowgrove_kernels.arguments import (
    check_constant,
    check_fanout,
    check_tensor,
    is_integer,
    is_number,
    number,
    wrong,
)
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.noise import SHARED_STEP, NoiseKey

_COEFFICIENTS = tuple(f"coef.{field.name}" for field in fields(StepCoefficients))
_VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def detached(value: Tensor | None) -> Tensor | None:
    """`value` as a constant."""
    return None if value is None else value.detach()


def check_state(x: Tensor, name: str = "x") -> None:
    """A state is fp32 or float64 [B, ...]."""
    check_tensor(x, name)
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        wrong(name, x, "pass fp32 (or float64) [B, ...] with at least two dimensions")


def check_like(
    value: Tensor | None, name: str, shape: Sequence[int], x: Tensor, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """`value`, if it is there, has `shape`, the device of x and the dtype of x (or one of `dtypes`)."""
    if value is None:
        return
    check_tensor(value, name)
    allowed = (x.dtype,) if dtypes is None else dtypes
    if tuple(value.shape) != tuple(shape) or value.device != x.device or value.dtype not in allowed:
        names = " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in allowed))
        wrong(name, value, f"pass {names} {list(shape)} on {x.device}", place=True)


def check_velocity(x: Tensor, v: Tensor, v_uncond: Tensor | None, guidance_scale: float | None) -> float:
    """Checks v and v_uncond against x; returns the guidance scale (1 without guidance)."""
    check_tensor(v, "v")
    check_like(v, "v", x.shape, x, _VELOCITY_DTYPES)
    check_like(v_uncond, "v_uncond", x.shape, x, (v.dtype,))
    if (v_uncond is None) != (guidance_scale is None):
        raise ValueError("v_uncond and guidance_scale go together: pass both or neither")
    return 1.0 if guidance_scale is None else number(guidance_scale, "guidance_scale", "write a number")


def check_coefficients(coef: StepCoefficients, x: Tensor) -> None:
    """One row per sample, on the device of x; rows are not differentiated."""
    if not isinstance(coef, StepCoefficients):
        wrong("coef", coef, "pass StepCoefficients, which step_coefficients makes")
    rows = coef.x_coef.shape[0]  # len() would make a number of a symbol
    if rows != x.shape[0] or coef.x_coef.device != x.device:
        raise ValueError(
            f"coef has {rows} rows on {coef.x_coef.device}: pass {x.shape[0]} rows on {x.device} (one per row of x)"
        )
    for name, value in zip(_COEFFICIENTS, coef.tensors(), strict=True):
        check_constant(value, name)


def check_edges(x: Tensor, x_next: Tensor, fanout: int, child_offsets: Tensor | None) -> int:
    """Checks x_next [E, ...] against x [B, ...] and the way children are counted; returns E."""
    check_state(x_next, "x_next")
    check_fanout(fanout)
    edges = x_next.shape[0]
    if child_offsets is None:
        if edges != x.shape[0] * fanout:
            raise ValueError(
                f"x_next has {edges} rows: pass B·fanout = {x.shape[0]}·{fanout} = {x.shape[0] * fanout} rows"
            )
    else:
        if fanout != 1:
            raise ValueError("child_offsets replaces fanout: leave fanout at 1")
        check_like(child_offsets, "child_offsets", (x.shape[0] + 1,), x, (torch.int64,))
    check_like(x_next, "x_next", (edges, *x.shape[1:]), x)
    return edges


def clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """(ε_lo, ε_hi) of a number or a pair."""
    pair = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    if len(pair) != 2 or not (is_number(pair[0], 0, 1) and is_number(pair[1], 0, math.inf)):
        wanted = "write a number in [0, 1] or a pair (low, high) with low in [0, 1] and high >= 0"
        wrong("clip_range", clip_range, wanted)
    return float(pair[0]), float(pair[1])


def packed_key(key: NoiseKey | None, rows: int, device: torch.device) -> Tensor | None:
    """A key as the ops take it."""
    if key is None:
        return None
    if not isinstance(key, NoiseKey):
        wrong("key", key, "pass a NoiseKey")
    return key.pack(rows, device)


def require_offsets(child_offsets: Tensor | None, edges: int) -> None:
    """Fails, on the device, if CSR offsets do not rise from 0 to `edges`."""
    if child_offsets is not None:
        ordered = (child_offsets[0] == 0) & (child_offsets[-1] == edges) & (child_offsets.diff() >= 0).all()
        torch._assert_async(ordered, f"child_offsets must rise from 0 to the number of rows of x_next ({edges})")


def require_no_history(prev_coef: Tensor) -> None:
    """Fails, on the device, if a row wants the previous clean estimate."""
    torch._assert_async(
        (prev_coef == 0).all(), "these coefficients need history=, the previous clean estimate: prev_coef is not 0"
    )


def check_correlation(sibling_correlation: float, key: NoiseKey | None) -> float:
    """ρ in [0, 1]; a positive one needs a key that names the parents, and a step
    below the words that shared components use.
    """
    correlation = number(sibling_correlation, "sibling_correlation", "write a number in [0, 1]", 0, 1)
    if correlation == 0:
        return 0.0
    if not isinstance(key, NoiseKey) or key.parent is None:
        raise ValueError(
            "sibling_correlation needs key=NoiseKey(..., parent=...): siblings share the noise that their parent names"
        )
    if is_integer(key.step) and key.step >= SHARED_STEP - 1:  # the ops check tensors
        raise ValueError(f"NoiseKey.step is {key.step}: write a step below 2**31 - 1 for correlated siblings")
    return correlation
