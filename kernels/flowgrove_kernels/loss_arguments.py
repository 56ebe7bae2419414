"""What the loss takes, named and ordered once: for the schema of its ops, its implementations and its backward."""

from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from flowgrove_kernels.arguments import LARGEST, check_tensor, number
from flowgrove_kernels.checks import (
    check_coefficients,
    check_correlation,
    check_edges,
    check_like,
    check_state,
    check_velocity,
    clip_bounds,
    detached,
    packed_key,
)
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.noise import NoiseKey


class LossArguments(NamedTuple):
    """B states, E edges (steps from a state to a child). Tensors first; the names are those of the ops' schemas."""

    x: Tensor  # [B, ...]
    v: Tensor  # [B, ...]
    x_next: Tensor  # [E, ...]
    x_coef: Tensor  # coefficients: [B]
    v_coef: Tensor
    prev_coef: Tensor  # 0 in every row
    std: Tensor
    precision: Tensor
    log_norm: Tensor
    old_logp: Tensor | None  # [E]; None: on-policy
    advantage: Tensor  # [E]
    weight: Tensor  # [E]
    child_offsets: Tensor | None  # int64 [B + 1], CSR; None: `fanout` children each
    key: Tensor | None  # int64 [6, E], packed
    noise: Tensor | None  # [E, ...]
    v_ref: Tensor | None  # [B, ...]
    v_uncond: Tensor | None  # [B, ...]
    guard: bool
    clip_low: float
    clip_high: float
    fanout: int
    sibling_correlation: float
    kl_weight: float
    guidance_scale: float  # 1 without guidance


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "SymInt", float: "float"}
_HINTS = get_type_hints(LossArguments)
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in _HINTS.items())
TENSORS = tuple(name for name, hint in _HINTS.items() if hint in (Tensor, Tensor | None))
CONSTANTS = tuple(name for name in LossArguments._fields if name not in TENSORS)


def checked_arguments(
    x: Tensor, v: Tensor, x_next: Tensor, coef: StepCoefficients, old_logp: Tensor | None, advantage: Tensor,
    weight: Tensor, clip_range: float | tuple[float, float], fanout: int, child_offsets: Tensor | None, ratio: str,
    key: NoiseKey | None, noise: Tensor | None, sibling_correlation: float, v_ref: Tensor | None, kl_weight: float,
    v_uncond: Tensor | None, guidance_scale: float | None,
) -> LossArguments:  # fmt: skip
    """The arguments of the Python functions as the ops take them; what is no velocity becomes a constant.

    Raises ValueError for a shape, dtype, device or combination that the functions do not allow.
    """
    check_state(x)
    scale = check_velocity(x, v, v_uncond, guidance_scale)
    check_coefficients(coef, x)
    edges = check_edges(x, x_next, fanout, child_offsets)
    check_tensor(advantage, "advantage")
    check_tensor(weight, "weight")
    for name, value in (("old_logp", old_logp), ("advantage", advantage), ("weight", weight)):
        check_like(value, name, (edges,), x, (torch.float32, x.dtype))
    low, high = clip_bounds(clip_range)
    if ratio not in ("density", "guard"):
        raise ValueError(f"ratio is {ratio!r}: write 'density' or 'guard'")
    if (ratio == "guard") != (key is not None or noise is not None) or (key is not None and noise is not None):
        raise ValueError("ratio='guard' needs key= or noise= (one of them), and only 'guard' takes them")
    check_like(noise, "noise", x_next.shape, x)
    correlation = check_correlation(sibling_correlation, key)
    check_like(v_ref, "v_ref", x.shape, x, (v.dtype, x.dtype, torch.float32))
    most = 0 if v_ref is None else LARGEST
    pull = number(kl_weight, "kl_weight", "write a number >= 0, and pass v_ref= where it is positive", 0, most)
    return LossArguments(
        x=x.detach(),
        v=v,
        x_next=x_next.detach(),
        x_coef=coef.x_coef,
        v_coef=coef.v_coef,
        prev_coef=coef.prev_coef,
        std=coef.std,
        precision=coef.precision,
        log_norm=coef.log_norm,
        old_logp=detached(old_logp),
        advantage=advantage.detach(),
        weight=weight.detach(),
        child_offsets=child_offsets,
        key=packed_key(key, edges, x.device),
        noise=detached(noise),
        v_ref=detached(v_ref),
        v_uncond=v_uncond,
        guard=ratio == "guard",
        clip_low=low,
        clip_high=high,
        fanout=fanout,
        sibling_correlation=correlation,
        kl_weight=pull,
        guidance_scale=scale,
    )
