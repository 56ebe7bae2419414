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
        self._dtypes = {average.dtype for average in self.average.values()}

    @torch.no_grad()
    def update(self, found_inf: Tensor) -> None:
        """Follows the weights by one update, or by none where the update was skipped: `found_inf`, fp32 [] on the
        device, is 1 then. The host reads nothing: a share of 0 leaves the average as it is, to the last bit.
        """
        shares = {dtype: (1 - self.decay) * (1 - found_inf.to(dtype)) for dtype in self._dtypes}
        for name, parameter in self.weights.trainable().items():
            average = self.average[name]
            average.lerp_(parameter, shares[average.dtype])

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
