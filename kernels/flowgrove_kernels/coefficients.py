"""Rows of step coefficients: every published dynamics as one affine-Gaussian step.

    μ    = a·x + b·v + c·p            p: the previous clean estimate (multistep solvers only)
    x'   = μ + s·z                    z ~ N(0, I)
    logp = log_norm − κ·mean_D (x' − μ)²

Rows are computed on the host in float64 and stored as float32. Sources: Flow-GRPO (2505.05470), DanceGRPO (2505.07818),
MixGRPO (2507.21802), coefficients-preserving sampling (2509.05952), DPM-Solver++ (2211.01095).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flowgrove_kernels.arguments import is_integer, is_number, number, wrong

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class StepCoefficients:
    """One row per sample, six fp32 tensors [B] on one device: a, b, c, s, κ and log_norm of the step above.

    Rows of one batch may differ.
    (float64 fields are accepted for analysis; the ops promote fp32 rows to the dtype of the states.)
    """

    x_coef: Tensor
    v_coef: Tensor
    prev_coef: Tensor
    std: Tensor
    precision: Tensor
    log_norm: Tensor

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, first = f"StepCoefficients.{field.name}", getattr(self, field.name), self.x_coef
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                wrong(name, value, "pass a dense torch tensor")
            alike = value.shape == first.shape and value.dtype == first.dtype and value.device == first.device
            if value.ndim != 1 or not alike or value.dtype not in (torch.float32, torch.float64):
                wrong(name, value, "pass fp32 [B] with the same B, dtype and device in all six fields")

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six fields in order."""
        return self.x_coef, self.v_coef, self.prev_coef, self.std, self.precision, self.log_norm

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StepCoefficients":
        """The same rows on `device`."""
        return StepCoefficients(*(t.to(device, non_blocking=non_blocking) for t in self.tensors()))

    def __len__(self) -> int:
        return self.x_coef.shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int] | int) -> "StepCoefficients":
        """The chosen rows; one index gives one row (B = 1), so that the result is always a batch.

        Raises IndexError for an int outside [−B, B), and ValueError for what chooses no rows.
        """
        if is_integer(rows):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"coef[{rows}]: there are {len(self)} rows")
            first = int(rows) % len(self)
            rows = slice(first, first + 1)
        elif isinstance(rows, Tensor) and rows.ndim == 0 and rows.dtype != torch.bool:
            rows = rows.reshape(1)
        elif isinstance(rows, Sequence) and not isinstance(rows, str):
            rows = list(rows)
        elif not isinstance(rows, slice) and getattr(rows, "ndim", None) != 1:
            wrong("the index of coef", rows, "pass an int, a slice, or a list or 1-D tensor of row numbers")
        return StepCoefficients(*(t[rows] for t in self.tensors()))

    @staticmethod
    def cat(parts: Sequence["StepCoefficients"]) -> "StepCoefficients":
        """All rows of `parts`, in order. Raises ValueError unless there are some, of one dtype on one device."""
        if not parts:
            raise ValueError("StepCoefficients.cat got an empty sequence: pass at least one")
        for i, part in enumerate(parts):
            if not isinstance(part, StepCoefficients):
                wrong(f"part {i} of StepCoefficients.cat", part, "pass StepCoefficients")
            rows, first = part.std, parts[0].std
            if rows.dtype != first.dtype or rows.device != first.device:
                wanted = f"pass {first.dtype} on {first.device}, like the first"
                wrong(f"part {i} of StepCoefficients.cat", rows, wanted, place=True)
        return StepCoefficients(*(torch.cat(columns) for columns in zip(*(p.tensors() for p in parts), strict=True)))


def step_coefficients(
    dynamics: str,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise_level: float = 0.0,
    sigma_max: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> StepCoefficients:
    """Rows of one-step dynamics from noise level σ to σ' < σ.

    dynamics: "ode" (Euler), "flow_sde" (Flow-GRPO, MixGRPO), "dance_sde" (DanceGRPO, BranchGRPO), "wan_sde" (Flow-GRPO
        for Wan) or "cps".
    sigma, sigma_next: floats, or 1-D float64 tensors [B] in [0, 1].
    noise_level: η >= 0; "ode" and "wan_sde" take none. With "cps" all noise is new at 1, less of it beyond.
    sigma_max: the second entry of the σ table; flow_sde needs it where σ = 1, wan_sde always.

    Returns rows [B] on the CPU: fp32, as the ops take them, or float64 for analysis (`dtype`).
    Raises ValueError for an unknown name, σ' ≥ σ, a missing sigma_max, or rows that `dtype` cannot hold.
    """
    here, there = _levels(sigma=sigma, sigma_next=sigma_next)
    if not bool(((there >= 0) & (there < here) & (here <= 1)).all()):
        raise ValueError("step_coefficients needs 0 <= sigma_next < sigma <= 1 in every row")
    if not isinstance(dynamics, str) or dynamics not in _DYNAMICS:
        raise ValueError(f"unknown dynamics {dynamics!r}: write one of {', '.join(_DYNAMICS)}")
    level = number(noise_level, "noise_level", "write a number >= 0", 0)
    if sigma_max is not None and not (is_number(sigma_max, 0, 1) and sigma_max > 0):
        wrong("sigma_max", sigma_max, "write the second entry of the sigma table, in (0, 1]")
    columns = _DYNAMICS[dynamics](here, there, level, sigma_max)
    if dynamics == "wan_sde":
        return _rows(columns, dtype, f"wan_sde with sigma_max {sigma_max:g}", ", or a sigma_max nearer 1")
    return _rows(
        columns, dtype, f"{dynamics} with noise_level {level:g}", ", or a noise_level nearer 1 (0 for no noise)"
    )


def dpmpp_2m_coefficients(
    sigma_prev: float | Tensor, sigma: float | Tensor, sigma_next: float | Tensor, *, dtype: torch.dtype = torch.float32
) -> StepCoefficients:
    """Rows of DPM-Solver++ 2M (midpoint) for rectified flow: x' = x + dt·v + c·(p − x̂0).

    p is the clean estimate of the previous step. Arguments are floats or 1-D float64 tensors [B], σ_prev > σ > σ';
    where σ_prev = 1 or σ' = 0 the row is Euler's (c = 0). Raises ValueError otherwise.
    The first step of a tail, and a step after a stochastic one, are Euler: take `step_coefficients("ode", …)` there.
    """
    before, here, there = _levels(sigma_prev=sigma_prev, sigma=sigma, sigma_next=sigma_next)
    if not bool(((there >= 0) & (there < here) & (here < before) & (before <= 1)).all()):
        raise ValueError("dpmpp_2m_coefficients needs 0 <= sigma_next < sigma < sigma_prev <= 1 in every row")
    dt = there - here
    first_order = (before == 1) | (there == 0)
    # log-SNR of the rectified flow; the values put in for first-order rows only keep the unused branch finite
    lam_before = _log_snr(torch.where(first_order, (1 + here) / 2, before))
    lam_here, lam_there = _log_snr(here), _log_snr(torch.where(first_order, here / 2, there))
    k = torch.where(first_order, 0.0, (lam_there - lam_here) / (2 * (lam_here - lam_before)))
    c = k * dt / here
    zero = torch.zeros_like(c)
    return _rows((1 - c, dt + here * c, c, zero, zero, zero), dtype, "dpmpp_2m")


def _levels(**named: float | Tensor) -> tuple[Tensor, ...]:
    """Noise levels, named as the caller knows them, as float64 [B] of one length."""
    levels = [_level(name, value) for name, value in named.items()]
    lengths = {len(level) for level in levels} - {1}
    if len(lengths) > 1:
        raise ValueError(f"{' and '.join(named)} have {sorted(lengths)} rows: pass the same number, or one")
    return torch.broadcast_tensors(*levels)


def _level(name: str, value: float | Tensor) -> Tensor:
    wanted = "pass a float or a float64 [B] tensor on the CPU"
    if not isinstance(value, Tensor):
        return torch.tensor([number(value, name, wanted)], dtype=torch.float64, device="cpu")
    where = value.layout, value.dtype, value.device.type
    if value.ndim > 1 or where != (torch.strided, torch.float64, "cpu"):
        wrong(name, value, wanted, place=True)
    return value.reshape(-1)


def _log_snr(sigma: Tensor) -> Tensor:
    return torch.log((1 - sigma) / sigma)


_Columns = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # float64 [B]: a, b, c, s, κ, log_norm


def _rows(columns: _Columns, dtype: torch.dtype, made_of: str, instead: str = "") -> StepCoefficients:
    rows = StepCoefficients(*(column.to(dtype) for column in columns))
    if not all(bool(column.isfinite().all()) for column in rows.tensors()):
        raise ValueError(f"{made_of} gives a row that {dtype} cannot hold: take sigmas further apart{instead}")
    return rows


def _ode(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float | None) -> _Columns:
    zero = torch.zeros_like(sigma)
    return torch.ones_like(sigma), sigma_next - sigma, zero, zero, zero, zero


def _sde(g: Tensor, sigma: Tensor, sigma_next: Tensor) -> _Columns:
    """Euler–Maruyama of dx = [v + g²/(2σ)·(x + (1−σ)v)] dt + g dw; a row without noise (g = 0) is an Euler row."""
    dt = sigma_next - sigma
    drift = g.square() * dt / (2 * sigma)
    std = g * (-dt).sqrt()
    quiet = std == 0
    safe = torch.where(quiet, 1.0, std)
    precision = torch.where(quiet, 0.0, 1 / (2 * safe.square()))
    log_norm = torch.where(quiet, 0.0, -safe.log() - _HALF_LOG_TWO_PI)
    return 1 + drift, dt + drift * (1 - sigma), torch.zeros_like(sigma), std, precision, log_norm


def _flow_sde(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float | None) -> _Columns:
    if sigma_max is None and bool((sigma == 1).any()):
        raise ValueError("flow_sde at sigma = 1 needs sigma_max: pass the second entry of the sigma table")
    capped = sigma if sigma_max is None else sigma.clamp(max=sigma_max)
    if bool((capped == 1).any()):
        raise ValueError("flow_sde at sigma = 1 needs sigma_max < 1: pass the second entry of the sigma table")
    return _sde(noise_level * (sigma / (1 - capped)).sqrt(), sigma, sigma_next)


def _dance_sde(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float | None) -> _Columns:
    return _sde(torch.full_like(sigma, noise_level), sigma, sigma_next)


def _wan_sde(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float | None) -> _Columns:
    if sigma_max is None:
        raise ValueError("wan_sde needs sigma_max: pass the second entry of the sigma table")
    return _sde(sigma_max * sigma, sigma, sigma_next)


def _cps(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float | None) -> _Columns:
    """Coefficients-preserving: x' = (1−σ')·x̂0 + q·x̂1 + s·z with q = √(σ'² − s²), also for η > 1.
    Its logp is −mean (x' − μ)², not a density.
    """
    if noise_level > 2:
        raise ValueError(f"cps has a noise_level of at most 2, not {noise_level:g}: write at most 1 to lose no noise")
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    q = sigma_next * abs(math.cos(noise_level * math.pi / 2))
    zero = torch.zeros_like(sigma)
    precision = torch.where(std == 0, 0.0, 1.0)
    return (1 - sigma_next) + q, q * (1 - sigma) - (1 - sigma_next) * sigma, zero, std, precision, zero


_Builder = Callable[[Tensor, Tensor, float, float | None], _Columns]
_DYNAMICS: dict[str, _Builder] = {
    "ode": _ode,
    "flow_sde": _flow_sde,
    "dance_sde": _dance_sde,
    "wan_sde": _wan_sde,
    "cps": _cps,
}
# Coefficients of (σ_prev, σ, σ') that use the previous clean estimate, by the name of the solver.
MULTISTEP: dict[str, Callable[[float | Tensor, float | Tensor, float | Tensor], StepCoefficients]] = {
    "dpmpp_2m": dpmpp_2m_coefficients,
}
