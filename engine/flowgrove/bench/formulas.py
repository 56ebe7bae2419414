"""The step and its log-probability in float64, a block of columns at a time:
what every contender has to return before it is timed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from flowgrove_kernels import StepCoefficients

_BLOCK = 2**22  # elements that are in float64 at one time


class Formulas:
    """μ = a·x + b·v,  x' = μ + s·z,  logp = log_norm − κ·mean (x' − μ)²  for states x and velocities v, both [B, D],
    and float64 rows.
    """

    def __init__(self, x: Tensor, v: Tensor, rows: StepCoefficients) -> None:
        self.x, self.v, self.rows = x, v, rows

    def blocks(self) -> Iterator[slice]:
        """Slices of columns, all of them together once."""
        batch, elements = self.x.shape
        width = max(_BLOCK // batch, 1)
        for start in range(0, elements, width):
            yield slice(start, min(start + width, elements))

    def mean(self, block: slice) -> Tensor:
        """μ float64 [B, width]."""
        return (
            self.rows.x_coef[:, None] * self.x[:, block].double()
            + self.rows.v_coef[:, None] * self.v[:, block].double()
        )

    def step(self, noise: Tensor, block: slice) -> Tensor:
        """x' float64 [B, width] with noise [B, D]."""
        return self.mean(block) + self.rows.std[:, None] * noise[:, block].double()

    def logp(self, x_next: Tensor) -> Tensor:
        """float64 [B] for x_next [B, D]."""
        squares = torch.zeros_like(self.rows.std)
        for block in self.blocks():
            squares += (x_next[:, block].double() - self.mean(block)).square().sum(1)
        return self.rows.log_norm - self.rows.precision * squares / x_next.shape[1]
