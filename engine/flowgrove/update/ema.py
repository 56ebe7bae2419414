"""An exponential moving average of the trained weights:
kept on the device, swapped in for evaluation, sampling and export.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average ← decay·average + (1 − decay)·weight after every update."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], decay: float, after_swap: Callable[[], None] = lambda: None
    ) -> None:
        self.parameters, self.decay, self.after_swap = parameters, decay, after_swap
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follows the weights by one update."""
        torch._foreach_lerp_(
            [self.average[name] for name in self.parameters], list(self.parameters.values()), 1 - self.decay
        )

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the average inside the block. Storage changes hands, nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data
        self.after_swap()
