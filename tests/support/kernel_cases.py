"""Inputs that the kernel tests share, and the formulas of MATH.md written the slow way."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from flowgrove_kernels import StepCoefficients, flow_step, step_coefficients

GOLDEN = Path(__file__).parents[1] / "golden" / "steps.npz"
SIGMA_MAX = 0.95
ODD_SIZES = (1, 3, 63, 129, 1031)
STOCHASTIC = (
    ("flow_sde", 1.0, 0.95, 0.7),
    ("dance_sde", 0.9, 0.8, 0.3),
    ("wan_sde", 0.7, 0.55, 0.0),
    ("cps", 0.6, 0.4, 0.7),
    ("flow_sde", 0.3, 0.2, 0.9),
    ("dance_sde", 0.25, 0.1, 0.5),
)

TREES = {"fanout 1": [1] * 7, "fanout 3": [3] * 6, "uneven": [2, 0, 3, 1, 2, 4]}
LOSS_MODES = {
    "density": {},
    "guard": {"ratio": "guard"},
    "on-policy": {"old_logp": None},
    "guard on-policy": {"ratio": "guard", "old_logp": None},
    "kl": {"kl_weight": 0.3},
    "guidance": {"guidance_scale": 2.5},
    "guard, kl, guidance": {"ratio": "guard", "kl_weight": 0.3, "guidance_scale": 2.5},
    "on-policy, kl, guidance": {"old_logp": None, "kl_weight": 0.3, "guidance_scale": 2.5},
}
CLIP_LOW, CLIP_HIGH = 0.005, 0.01


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def row(a: float, b: float, c: float, s: float, kappa: float, log_norm: float) -> StepCoefficients:
    return StepCoefficients(*(torch.tensor([float(value)]) for value in (a, b, c, s, kappa, log_norm)))


def stochastic_rows(batch: int) -> StepCoefficients:
    """Rows of every stochastic dynamics in turn, at different noise levels."""
    picks = (STOCHASTIC[i % len(STOCHASTIC)] for i in range(batch))
    return StepCoefficients.cat(
        [step_coefficients(name, here, there, noise_level=eta, sigma_max=SIGMA_MAX) for name, here, there, eta in picks]
    )


def pad(rows: Tensor, like: Tensor) -> Tensor:
    """[B] → [B, 1, ...] in the dtype of `like`."""
    return rows.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


def assert_equal(ours, expected) -> None:
    """The same bits in every tensor."""
    assert len(ours) == len(expected)
    for left, right in zip(ours, expected, strict=True):
        assert torch.equal(left, right)


@dataclass
class Rollout:
    """E steps that a policy with velocity v_old took, to be scored under v. `children`:
    fanout= or child_offsets=, whichever describes them.
    """

    x: Tensor  # [B, ...]
    v: Tensor  # [B, ...]
    v_old: Tensor  # [B, ...]
    coef: StepCoefficients
    parent: Tensor  # [E]
    children: dict
    noise: Tensor  # [E, ...]
    x_next: Tensor  # [E, ...]
    old_logp: Tensor  # [E], moved by about 0.1 so that ratios fall on both sides of 1
    advantage: Tensor  # [E]
    weight: Tensor  # [E]

    def positional(self) -> tuple:
        return self.x, self.v, self.x_next, self.coef, self.old_logp, self.advantage, self.weight


def rollout(
    children: list[int], shape: tuple[int, ...], *, dtype=torch.float64, v_dtype=None, drift: float = 0.3, seed: int = 0
) -> Rollout:
    """One parent per entry of `children`, which is its number of children; v = v_old + drift·noise."""
    batch, edges = len(children), sum(children)
    parent = torch.repeat_interleave(torch.arange(batch), torch.tensor(children))
    x, v_old = randn(batch, *shape, seed=seed, dtype=dtype), randn(batch, *shape, seed=seed + 1, dtype=v_dtype or dtype)
    v = (v_old + drift * randn(batch, *shape, seed=seed + 2, dtype=dtype)).to(v_old.dtype)
    noise, coef = randn(edges, *shape, seed=seed + 3, dtype=dtype), stochastic_rows(batch)
    x_next, old_logp = flow_step(x[parent], v_old[parent], coef[parent], noise=noise)
    offsets = torch.tensor([0, *numpy.cumsum(children)])
    counts = {"fanout": children[0]} if len(set(children)) == 1 else {"child_offsets": offsets}
    advantage, weight, shift = (randn(edges, seed=seed + i, dtype=dtype) for i in (4, 5, 6))
    return Rollout(
        x, v, v_old, coef, parent, counts, noise, x_next, old_logp + 0.1 * shift, advantage, weight.abs() + 0.1
    )


def mean_and_logp(
    x: Tensor, v: Tensor, x_next: Tensor, coef: StepCoefficients, parent: Tensor
) -> tuple[Tensor, Tensor]:
    """MATH §1, edge by edge: μ [E, ...] and logp [E]."""
    mean = (pad(coef.x_coef, x) * x + pad(coef.v_coef, x) * v)[parent]
    squares = (x_next - mean).square().flatten(1).mean(1)
    return mean, coef.log_norm.to(x.dtype)[parent] - coef.precision.to(x.dtype)[parent] * squares


def naive_loss(
    case: Rollout,
    v: Tensor,
    low: float,
    high: float,
    *,
    old_logp="rollout",
    noise=None,
    v_ref=None,
    kl_weight=0.0,
    v_uncond=None,
    gamma=1.0,
):
    """MATH §3 with autograd: (loss, logp, ratio, kl). noise: the guard ratio, from its definition mean(z⊙Δμ)."""
    velocity = v if v_uncond is None else v_uncond + gamma * (v - v_uncond)
    mean, logp = mean_and_logp(case.x, velocity, case.x_next, case.coef, case.parent)
    std = case.coef.std.to(case.x.dtype)[case.parent]
    score = logp - case.old_logp
    if noise is not None:
        sampled_mean = case.x_next - pad(std, noise) * noise
        score = (noise * (mean - sampled_mean)).flatten(1).mean(1)
    ratio = torch.exp(score - score.detach() if old_logp is None else score)
    surrogate = torch.maximum(-case.advantage * ratio, -case.advantage * ratio.clamp(1 - low, 1 + high))
    loss, kl = (case.weight * surrogate).sum(), torch.zeros_like(logp)
    if v_ref is not None:
        b = case.coef.v_coef.to(case.x.dtype)[case.parent]
        kl = b**2 * (velocity - v_ref).square().flatten(1).mean(1)[case.parent] / (2 * std**2)
        loss = loss + kl_weight * (case.weight * kl).sum()
    return loss, logp, ratio, kl


def loss_arguments(case: Rollout, *, ratio="density", old_logp="rollout", kl_weight=0.0, guidance_scale=None):
    """(positional arguments of grpo_loss, its keyword arguments, those of naive_loss)."""
    ref = case.v_old + 0.2 * randn(*case.v.shape, seed=31, dtype=case.x.dtype).to(case.v.dtype) if kl_weight else None
    uncond = (
        case.v_old + 0.1 * randn(*case.v.shape, seed=32, dtype=case.x.dtype).to(case.v.dtype)
        if guidance_scale
        else None
    )
    noise = case.noise if ratio == "guard" else None
    positional = list(case.positional())
    positional[4] = None if old_logp is None else case.old_logp
    ours = {
        "clip_range": (CLIP_LOW, CLIP_HIGH),
        "ratio": ratio,
        "noise": noise,
        "v_ref": ref,
        "kl_weight": kl_weight,
        "guidance_scale": guidance_scale,
    }
    naive = {"old_logp": old_logp, "noise": noise, "v_ref": ref, "kl_weight": kl_weight, "gamma": guidance_scale or 1.0}
    return positional, case.children | ours | {"v_uncond": uncond}, naive | {"v_uncond": uncond}


def philox_reference(counter, key) -> list:
    """Philox4x32-10 (Salmon et al., SC11) on numpy uint64 words that broadcast."""
    word = numpy.uint64(0xFFFFFFFF)
    c = [numpy.asarray(value, dtype=numpy.uint64) for value in counter]
    k = [int(value) for value in key]
    for _ in range(10):
        high_low = [
            (p >> numpy.uint64(32), p & word)
            for p in (c[0] * numpy.uint64(0xD2511F53), c[2] * numpy.uint64(0xCD9E8D57))
        ]
        (h0, l0), (h1, l1) = high_low
        c = [h1 ^ c[1] ^ numpy.uint64(k[0]), l1, h0 ^ c[3] ^ numpy.uint64(k[1]), l0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def box_muller(words, *, round_angle: bool = True) -> numpy.ndarray:
    """float64 normals [..., 4] of four words;
    the angle fl32(2π)·u1 rounded to fp32 as MATH §2 forms it, or kept exact.
    """
    u = [
        ((numpy.asarray(r, dtype=numpy.uint64) >> numpy.uint64(9)).astype(numpy.float64) + 0.5) * 2.0**-23
        for r in words
    ]
    pairs = []
    for first, second in ((u[0], u[1]), (u[2], u[3])):
        radius, angle = numpy.sqrt(-2 * numpy.log(first)), float(numpy.float32(2 * math.pi)) * second
        if round_angle:
            angle = angle.astype(numpy.float32).astype(numpy.float64)
        pairs += [radius * numpy.cos(angle), radius * numpy.sin(angle)]
    return numpy.stack(pairs, axis=-1)


def normal_reference(rows, elements: int, *, round_angle: bool = True) -> numpy.ndarray:
    """float64 [rows, elements] for rows of (seed, iteration, step, prompt, node)."""
    blocks = numpy.arange((elements + 3) // 4)
    out = [
        box_muller(philox_reference((blocks, node, step, prompt), (seed, it)), round_angle=round_angle)
        for seed, it, step, prompt, node in rows
    ]
    return numpy.stack([z.reshape(-1)[:elements] for z in out])
