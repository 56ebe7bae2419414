"""bf16 compute over fp32 masters: what trains is fp32, what the passes read are bf16 copies, rounded once per update.

Autocast alone would round every trained weight anew in every pass; the products, and so velocities and gradients, are
the same to the bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # modules whose weights autocast rounds


def is_rounded(transformer: nn.Module, name: str) -> bool:
    """Whether autocast rounds the weight of this name."""
    return isinstance(transformer.get_submodule(name.rpartition(".")[0]), ROUNDED)


class Piece(NamedTuple):
    """Which part of a weight of `shape` this rank has: rows of its first dimension, `start` being the first of them."""

    shape: torch.Size
    start: int


class Masters:
    """The fp32 masters of a transformer's trained linear and convolution layers, whose own parameters become copies in
    `dtype`.

    A gradient goes to the master as soon as it is complete, and the copy's is freed.
    """

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        self.of: dict[str, nn.Parameter] = {}
        self._copies: list[Tensor] = []
        for name, copy in list(transformer.named_parameters()):
            if copy.requires_grad and is_rounded(transformer, name):
                master = nn.Parameter(copy.data)
                copy.data = copy.data.to(dtype)
                copy.register_post_accumulate_grad_hook(_to_master(master))
                self.of[name] = master
                self._copies.append(copy)

    @torch.no_grad()
    def refresh(self) -> None:
        """The copies follow the masters."""
        if self._copies:
            masters: list[Tensor] = list(self.of.values())
            torch._foreach_copy_(self._copies, masters)


def _to_master(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(copy: Tensor) -> None:
        # first: where memory runs out below, nothing stays behind for the next attempt
        gradient = copy.grad
        copy.grad = None
        if gradient is not None:
            master.grad = gradient.to(master.dtype) if master.grad is None else master.grad.add_(gradient)

    return move
