"""The shapes that are measured, and tensors of a shape."""

import re
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from flowgrove.bench.formulas import Formulas
from flowgrove.bench.published import NOISE_LEVEL
from flowgrove.errors import UserError
from flowgrove_kernels import NoiseKey, StepCoefficients, philox_normal, step_coefficients, use_backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STEPS, _SHIFT = 25, 3.0


@dataclass(frozen=True)
class Shape:
    """`rows` samples of `sample` elements."""

    name: str
    title: str
    rows: int
    sample: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements of one row."""
        return prod(self.sample)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("flux_720", "FLUX 720²", 16, (16, 90, 90)),
        Shape("sd35_512", "SD3.5 512²", 16, (16, 64, 64)),
        Shape("wan_480p81", "Wan 480p × 81 frames", 1, (16, 21, 60, 104)),
        Shape("wide", "wide", 512, (131_072,)),
        Shape("row_64m", "one row of 64 M", 1, (2**26,)),
    )
}
SMALL = ("flux_720", "sd35_512", "wan_480p81")  # what a CPU measures unless it is asked for more


def find_shape(text: str) -> Shape:
    """A shape by name, or any other as ROWSxELEMENTS. Raises UserError."""
    if text in SHAPES:
        return SHAPES[text]
    if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
        return Shape(text, text.replace("x", " × "), int(found[1]), (int(found[2]),))
    raise UserError(
        f"--shapes: there is no shape {text!r}: write names out of {', '.join(SHAPES)}, "
        "or ROWSxELEMENTS such as 16x65536"
    )


@dataclass(frozen=True)
class Inputs:
    """One batch of steps under the velocity v, and what their loss needs.
    Ratios are exp(±0.05), so no row is clipped.
    """

    shape: Shape
    dtype: str  # of v
    x: Tensor  # fp32 [B, ...]
    v: Tensor  # [B, ...]
    noise: Tensor  # fp32 [B, ...], what `key` names
    x_next: Tensor  # fp32 [B, ...], the step with that noise
    sigma: Tensor  # fp32 [B]
    sigma_next: Tensor  # fp32 [B]
    coef: StepCoefficients
    key: NoiseKey
    old_logp: Tensor  # fp32 [B]
    advantage: Tensor  # fp32 [B]
    weight: Tensor  # fp32 [B]: 1/B, so that the loss is the mean
    ones: Tensor  # fp32 [B]: the gradient of what is summed
    formulas: Formulas

    @property
    def device(self) -> torch.device:
        """The device of every tensor."""
        return self.x.device

    def copy(self) -> "Inputs":
        """The same values in other memory; the numbers per row are shared."""
        large = {name: getattr(self, name).clone() for name in ("x", "v", "noise", "x_next")}
        return replace(self, **large)


def make_inputs(shape: Shape, dtype: str, device: torch.device) -> Inputs:
    """Rows at different timesteps of a 25-step schedule; the same values in every run."""
    generator = torch.Generator(device).manual_seed(0)
    rows = shape.rows
    index = torch.arange(rows, dtype=torch.float64) % (_STEPS - 5) + 1
    sigma, sigma_next = (_level(1 - (index + offset) / _STEPS) for offset in (0, 1))
    exact = step_coefficients("flow_sde", sigma, sigma_next, noise_level=NOISE_LEVEL, dtype=torch.float64).to(device)
    coef = step_coefficients("flow_sde", sigma, sigma_next, noise_level=NOISE_LEVEL).to(device)
    x = torch.randn(rows, *shape.sample, device=device, generator=generator)
    v = torch.randn(rows, *shape.sample, device=device, generator=generator).to(DTYPES[dtype])
    key = NoiseKey(seed=0, iteration=0, step=3, prompt=0, node=torch.arange(rows)).packed(rows, device)
    with use_backend("reference"):
        noise = philox_normal(x.shape, key, device=device)
    formulas = Formulas(x.flatten(1), v.flatten(1), exact)
    x_next = torch.empty_like(x)
    for block in formulas.blocks():
        x_next.flatten(1)[:, block] = formulas.step(noise.flatten(1), block)
    sign = 1 - 2 * (torch.arange(rows, device=device) % 2).float()
    old_logp = (formulas.logp(x_next.flatten(1)) - 0.05 * sign).float()
    advantage = sign * torch.linspace(0.5, 1.5, rows, device=device)
    weight = torch.full((rows,), 1 / rows, device=device)
    here, there = (level.float().to(device) for level in (sigma, sigma_next))
    return Inputs(
        shape,
        dtype,
        x,
        v,
        noise,
        x_next,
        here,
        there,
        coef,
        key,
        old_logp,
        advantage,
        weight,
        torch.ones_like(weight),
        formulas,
    )


def _level(t: Tensor) -> Tensor:
    """σ of a shifted schedule in float64, with a value that float32 has, so that both sides see the same levels."""
    return (_SHIFT * t / ((1 - t) + _SHIFT * t)).float().double()
