"""An exponential moving average of the trained weights:
kept on the device, swapped in for evaluation, sampling and export.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowgrove.models.weights import Weights


class Ema:
    """average ← decay·average + (1 − decay)·weight after every update."""

    def __init__(self, weights: Weights, decay: float) -> None:
        self.weights, self.decay = weights, decay
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in weights.trainable().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follows the weights by one update."""
        parameters = self.weights.trainable()
        torch._foreach_lerp_([self.average[name] for name in parameters], list(parameters.values()), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the average inside the block, and `average` holds the weights. Nothing is copied."""
        self.weights.exchange(self.average)
        try:
            yield
        finally:
            self.weights.exchange(self.average)

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Goes on from this average, one tensor for each name and shape of a weight."""
        for name, held in self.average.items():
            held.copy_(average[name])
