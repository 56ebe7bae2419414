"""Whether outputs are what the formulas say in float64: no speed is reported for an op that is wrong."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrove.bench.inputs import Inputs
from flowgrove.bench.published import CLIP_RANGE

STATE = 5e-6  # |x' − exact|: a few roundings of numbers below 10, and normals within 3e-6
SCORE = 1e-5  # |logp − exact|, and of the loss; the worst measured is 1.3e-6, an fp32 mean over 2 to 64 M elements
GRADIENT = 1e-5  # of the largest gradient of the row; the worst measured is 1.2e-6
_ROUNDING = {"fp32": 2.0**-23, "bf16": 2.0**-8}  # of the gradient's dtype, relative


class Deviation(NamedTuple):
    """One output against the formulas; NaN is an error like any other."""

    output: str
    error: float
    tolerance: float

    @property
    def wrong(self) -> bool:
        """The error is above the tolerance, or not a number."""
        return not self.error <= self.tolerance


def check_step(inputs: Inputs, outputs: tuple[Tensor, ...], noise: Tensor | None) -> list[Deviation]:
    """(x_next, logp) with that noise; with None, x_next has to hold noise of mean 0 and variance 1."""
    x_next, logp = outputs
    flat = x_next.flatten(1)
    expected = inputs.formulas.logp(flat)
    state = _drawn(inputs, flat) if noise is None else [_given(inputs, flat, noise.flatten(1))]
    return [*state, Deviation("logp", _largest(logp - expected), SCORE)]


def check_logprob(inputs: Inputs, outputs: tuple[Tensor, ...]) -> list[Deviation]:
    """(logp,) or (logp, gradient of its sum)."""
    logp, *gradient = outputs
    found = [Deviation("logp", _largest(logp - inputs.formulas.logp(inputs.x_next.flatten(1))), SCORE)]
    return found + [_gradient(inputs, grad, torch.ones_like(inputs.formulas.rows.std)) for grad in gradient]


def check_loss(inputs: Inputs, outputs: tuple[Tensor, ...]) -> list[Deviation]:
    """(loss, gradient)."""
    loss, gradient = outputs
    advantage, weight = inputs.advantage.double(), inputs.weight.double()
    ratio = torch.exp(inputs.formulas.logp(inputs.x_next.flatten(1)) - inputs.old_logp.double())
    surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
    return [
        Deviation("loss", _largest(loss - (weight * surrogate).sum()), SCORE),
        _gradient(inputs, gradient, -weight * advantage * ratio),
    ]


def _given(inputs: Inputs, x_next: Tensor, noise: Tensor) -> Deviation:
    errors = [_largest(x_next[:, block] - inputs.formulas.step(noise, block)) for block in inputs.formulas.blocks()]
    return Deviation("x_next", _worst(errors), STATE)


def _drawn(inputs: Inputs, x_next: Tensor) -> list[Deviation]:
    """Six standard errors of the first two moments."""
    total, squares = 0.0, 0.0
    for block in inputs.formulas.blocks():
        z = (x_next[:, block].double() - inputs.formulas.mean(block)) / inputs.formulas.rows.std[:, None]
        total, squares = total + z.sum().item(), squares + z.square().sum().item()
    count = x_next.numel()
    return [
        Deviation("mean of the noise", abs(total / count), 6 / math.sqrt(count)),
        Deviation("variance of the noise", abs(squares / count - 1), 6 * math.sqrt(2 / count)),
    ]


def _gradient(inputs: Inputs, gradient: Tensor, slope: Tensor) -> Deviation:
    """∂/∂v = slope·(2κb/D)·(x' − μ), slope float64 [B]; the error in units of the row's largest gradient, beyond one
    rounding of the gradient's dtype.
    """
    rows, flat, x_next = inputs.formulas.rows, gradient.flatten(1), inputs.x_next.flatten(1)
    factor = slope * 2 * rows.precision * rows.v_coef / flat.shape[1]
    largest = torch.zeros_like(factor)
    excess = torch.zeros_like(factor)
    for block in inputs.formulas.blocks():
        expected = factor[:, None] * (x_next[:, block].double() - inputs.formulas.mean(block))
        largest = torch.maximum(largest, expected.abs().amax(1))
        beyond = (flat[:, block].double() - expected).abs() - _ROUNDING[inputs.dtype] * expected.abs()
        excess = torch.maximum(excess, beyond.amax(1))  # NaN stays
    return Deviation("gradient", _worst((excess / largest).tolist()), GRADIENT)


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item()


def _worst(errors: list[float]) -> float:
    """The largest, NaN if one is."""
    return torch.tensor(errors, dtype=torch.float64).max().item()
