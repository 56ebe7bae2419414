"""Gradients as short vectors: a sketch keeps the inner products of gradients, of which no two ever need be in memory at
once.

A count sketch (Charikar, Chen and Farach-Colton 2002): every element goes into one bucket with a random sign, so that

    E ⟨sketch(g), sketch(h)⟩ = ⟨g, h⟩,        standard deviation ≤ √2·‖g‖·‖h‖/√buckets

Bucket and sign of an element hang on its weight's name and place alone. So sketches are linear: those of several
ranks, or of parts of a gradient, add up to that of the sum. The number of buckets is prime and an element's bucket is
its place modulo that, so that neither a row nor a column of a weight that stands out falls into few buckets.
"""

import random
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrove.device import to_device

BUCKETS = 16_381  # prime: inner products to 0.8 % of the norms' product, 64 KiB a gradient
_ROWS = 128  # of as many buckets: elements that are taken together


class _Place(NamedTuple):
    """Where some elements of a weight go: `sign` times the signs that begin at `signs`, from bucket `bucket` on."""

    signs: int
    bucket: int
    sign: int


class Sketch:
    """Takes gradients of weights on `device` and of `dtype`; those of one `seed` compare with each other."""

    def __init__(self, seed: str, device: torch.device, dtype: torch.dtype, buckets: int = BUCKETS) -> None:
        self.buckets, self._seed, self._together = buckets, seed, _ROWS * buckets
        # drawn on the host, so that it is the same on every device
        draw = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        signs = torch.randint(0, 2, (2 * self._together,), generator=draw, dtype=torch.int8)
        self._signs = to_device(signs, device).to(dtype).mul_(2).sub_(1)
        self._places: dict[str, list[_Place]] = {}

    @torch.no_grad()
    def __call__(self, gradients: Iterable[tuple[str, Tensor]]) -> Tensor:
        """The sketch [buckets] of all these (name, gradient) together, on the device. The host waits for nothing."""
        found = self._signs.new_zeros(2 * self.buckets)  # a part may begin in any bucket: the second half is folded
        for name, gradient in gradients:
            flat = gradient.reshape(-1)
            if not len(flat):  # `split` makes one part of no elements
                continue
            for part, place in zip(flat.split(self._together), self._places_of(name, len(flat)), strict=True):
                signed = part * self._signs[place.signs : place.signs + len(part)]
                whole = len(part) // self.buckets * self.buckets
                for piece in (signed[:whole].view(-1, self.buckets).sum(0), signed[whole:]):
                    found[place.bucket : place.bucket + len(piece)].add_(piece, alpha=place.sign)
        return found[: self.buckets] + found[self.buckets :]

    def _places_of(self, name: str, elements: int) -> list[_Place]:
        if name not in self._places:
            draw = random.Random(f"{self._seed}/{name}")
            self._places[name] = [
                _Place(draw.randrange(self._together), draw.randrange(self.buckets), draw.choice((-1, 1)))
                for _ in range(0, elements, self._together)
            ]
        return self._places[name]
