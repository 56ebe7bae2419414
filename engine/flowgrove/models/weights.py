"""The weights of a policy: what trains, its fp32 masters, and the reference model. They change through here alone."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowgrove.models.float64 import keep_float64
from flowgrove.models.masters import Masters
from flowgrove.models.trainable import choose_trainable
from flowgrove.recipe.schema import Recipe


class Piece(NamedTuple):
    """Which part of a weight of `shape` this rank has: rows of its first dimension, `start` being the first of them."""

    shape: torch.Size
    start: int


class Weights:
    """A loaded transformer, made ready for training: whatever trains has fp32 masters (float64 for model.dtype fp64).

    With `compute` bf16 and `passes` the passes read bf16 copies of them; `passes` False: nothing will run, so that the
    transformer's own parameters stay the masters. Raises UserError for LoRA targets that match no layer.
    """

    def __init__(
        self, recipe: Recipe, transformer: Any, lora_targets: tuple[str, ...], compute: torch.dtype, passes: bool
    ) -> None:
        lora, master = recipe.model.lora, torch.float64 if compute == torch.float64 else torch.float32
        self.transformer = transformer
        if master == torch.float64:
            keep_float64(transformer)
        self.reference_copy: Any = None  # frozen; LoRA needs none: without it the model is the reference
        if lora is None and (recipe.update.kl_weight > 0 or recipe.run.eval.tuned_share < 1):
            self.reference_copy = copy.deepcopy(transformer).requires_grad_(False).to(compute)
        choose_trainable(transformer, lora, lora_targets, recipe.run.seed)
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(master)
        if recipe.model.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self._masters = Masters(transformer, compute) if compute == torch.bfloat16 and passes else None
        self.pieces: dict[str, Piece] = {}  # of the weights that are divided among ranks; the others are whole on each
        self._first = next(iter(self.trainable().values()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → master weight, in the transformer's order. An optimiser that has changed them calls `refresh`."""
        masters = self._masters.of if self._masters is not None else {}
        return {name: masters.get(name, p) for name, p in self.transformer.named_parameters() if p.requires_grad}

    def drop_gradients(self) -> None:
        """Drops the gradients of masters, and of copies where a backward has failed on its way."""
        self.transformer.zero_grad(set_to_none=True)
        for master in self._masters.of.values() if self._masters is not None else ():
            master.grad = None

    def refresh(self) -> None:
        """The weights that passes read follow the masters."""
        if self._masters is not None:
            self._masters.refresh()

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """The masters take the values of `tensors`, one for each of their names and shapes."""
        for name, parameter in self.trainable().items():
            parameter.copy_(tensors[name])
        self.refresh()

    def exchange(self, tensors: dict[str, Tensor]) -> None:
        """The masters and `tensors` of the same names change places: storage changes hands, nothing is copied."""
        for name, parameter in self.trainable().items():
            parameter.data, tensors[name] = tensors[name], parameter.data
        self.refresh()

    @property
    def identity(self) -> int:
        """Names the storage that the masters lie in, which is another one once they have been exchanged."""
        return self._first.data_ptr()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the reference model can run: `reference_copy`, or the transformer, whose LoRA is off."""
        if self.reference_copy is not None:
            yield
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()
