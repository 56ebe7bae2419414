"""Argument checks of the ops: each names the argument and says what to pass instead."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.noise import SHARED_STEP, NoiseKey

_VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def detached(value: Tensor | None) -> Tensor | None:
    """`value` as a constant."""
    return None if value is None else value.detach()


def check_state(x: Tensor, name: str = "x") -> None:
    """A state is fp32 or float64 [B, ...]."""
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}: pass fp32 (or float64) [B, ...] with at least two dimensions"
        )


def check_like(
    value: Tensor | None, name: str, shape: Sequence[int], x: Tensor, dtypes: Sequence[torch.dtype] | None = None
) -> None:
    """`value` has `shape`, the device of x and the dtype of x (or one of `dtypes`)."""
    if value is None:
        return
    allowed = (x.dtype,) if dtypes is None else dtypes
    if tuple(value.shape) != tuple(shape) or value.device != x.device or value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)} on {value.device}: pass {names} {list(shape)} on {x.device}"
        )


def check_velocity(x: Tensor, v: Tensor, v_uncond: Tensor | None, guidance_scale: float | None) -> float:
    """Checks v and v_uncond against x; returns the guidance scale (1 without guidance)."""
    check_like(v, "v", x.shape, x, _VELOCITY_DTYPES)
    check_like(v_uncond, "v_uncond", x.shape, x, (v.dtype,))
    if (v_uncond is None) != (guidance_scale is None):
        raise ValueError("v_uncond and guidance_scale go together: pass both or neither")
    return 1.0 if guidance_scale is None else float(guidance_scale)


def check_coefficients(coef: StepCoefficients, x: Tensor) -> None:
    """One row per sample, on the device of x."""
    if len(coef) != x.shape[0] or coef.x_coef.device != x.device:
        raise ValueError(
            f"coef has {len(coef)} rows on {coef.x_coef.device}: "
            f"pass {x.shape[0]} rows on {x.device} (one per row of x)"
        )


def check_edges(x: Tensor, x_next: Tensor, fanout: int, child_offsets: Tensor | None) -> int:
    """Checks x_next [E, ...] against x [B, ...] and the way children are counted; returns E."""
    edges = x_next.shape[0]
    if child_offsets is None:
        if fanout < 1:
            raise ValueError(f"fanout is {fanout}: write an integer >= 1")
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
    if not 0.0 <= sibling_correlation <= 1.0:
        raise ValueError(f"sibling_correlation is {sibling_correlation}: write a number in [0, 1]")
    if sibling_correlation == 0:
        return 0.0
    if key is None or key.parent is None:
        raise ValueError(
            "sibling_correlation needs key=NoiseKey(..., parent=...): siblings share the noise that their parent names"
        )
    if not isinstance(key.step, Tensor) and key.step >= SHARED_STEP - 1:  # the ops check tensors
        raise ValueError(f"NoiseKey.step is {key.step}: write a step below 2**31 - 1 for correlated siblings")
    return float(sibling_correlation)
