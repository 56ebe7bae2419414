"""A second tree of a transformer's modules that shares all of it but some parts: what runs passes more cheaply beside
the transformer that trains.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from flowgrove.models.adapter import Adapter
from flowgrove.models.compiling import compile_blocks
from flowgrove.models.geometry import Geometry


class Twin:
    """A transformer that stands beside another one, whose weights it shares. `compiled`: as engine.compile;
    `precision`: of its linear layers, None: the other's.
    """

    precision: Literal["fp8", "int8"] | None = None

    def __init__(self, transformer: Any, compiled: bool | str = False) -> None:
        self.transformer = transformer
        self._adapters: dict[Geometry, Adapter] = {}  # kept, since an adapter keeps what it finds of its transformer
        if compiled:
            compile_blocks(transformer, compiled)

    def adapter(self, full: Adapter) -> Adapter:
        """An adapter of the transformer's, of this one instead."""
        if full.geometry not in self._adapters:
            self._adapters[full.geometry] = full.on(self.transformer)
        return self._adapters[full.geometry].of_expert(full.expert)

    def changed(self) -> None:
        """The transformer's weights have changed."""

    def follow(self) -> None:
        """What this one does not share follows the transformer's weights, in place, so that recorded passes read it."""


def twin(module: nn.Module, instead: Mapping[Any, nn.Module]) -> Any:
    """A module with some parts replaced: parts that hold none of them are shared, the others are copied without their
    weights, which they share too.
    """
    if module in instead:
        return instead[module]
    parts = {name: None if part is None else twin(part, instead) for name, part in module._modules.items()}
    if all(part is module._modules[name] for name, part in parts.items()):
        return module
    one = copy.copy(module)
    one._modules = parts
    return one
