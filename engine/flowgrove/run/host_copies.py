"""Copies in host memory of what is written while the training goes on.

Those of a GPU's tensors are pinned, so that copying them takes little time. PyTorch pins in powers of two, which would
be half again as much for tensors of any size: they lie in a few blocks of such a size instead.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 1 << 30  # bytes
_ALIGNED = 512  # bytes


class Place(NamedTuple):
    """The block that a tensor lies in, and its first byte there."""

    block: int
    start: int


def packed(sizes: Sequence[int]) -> tuple[list[int], list[Place]]:
    """Blocks of a power of two bytes each, and the place of each of the tensors of `sizes` bytes in them."""
    blocks: list[int] = []
    places: list[Place] = []
    left = sum(_aligned(size) for size in sizes)
    used = 0
    for size in map(_aligned, sizes):
        if not blocks or used + size > blocks[-1]:
            blocks.append(max(_power_of_two(size), min(_BLOCK, _power_of_two(left))))
            used = 0
        places.append(Place(len(blocks) - 1, used))
        used += size
        left -= size
    return blocks, places


class HostCopies:
    """Copies of the same tensors again and again, in memory that is kept for it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, complete when the GPU has come so far."""
        alike = self._held.keys() == tensors.keys() and all(
            self._held[name].shape == tensor.shape and self._held[name].dtype == tensor.dtype
            for name, tensor in tensors.items()
        )
        if not alike:
            self._held = {}
            self._held = _room_for(tensors)
        for name, tensor in tensors.items():
            self._held[name].copy_(tensor, non_blocking=True)
        return self._held


def _room_for(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    sizes, places = packed([tensor.nbytes for tensor in tensors.values()])
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()) for size in sizes]
    return {
        name: blocks[place.block][place.start : place.start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), place in zip(tensors.items(), places, strict=True)
    }


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
