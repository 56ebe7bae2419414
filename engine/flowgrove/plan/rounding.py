"""What rollout.precision saves of a forward, before anything is loaded."""

from dataclasses import dataclass

import torch

from flowgrove.errors import UserError
from flowgrove.models.experts import FOLDERS
from flowgrove.models.quantised import Precision, copy_bytes, quantisable
from flowgrove.plan.flops import counted
from flowgrove.plan.unloaded import UnloadedModel
from flowgrove.recipe.schema import Recipe


@dataclass(frozen=True)
class Rounding:
    """Of a forward of one row of the longest prompt: FLOPs of the `layers` that are rounded, and of all; bytes of the
    weights of the transformer that it reads, without and with rounding.
    """

    precision: Precision
    layers: int
    rounded_flops: int
    flops: int
    full_bytes: int
    rounded_bytes: int


def count_rounding(recipe: Recipe) -> Rounding | None:
    """What the recipe's precision saves; None without one, and without the model's configuration files."""
    precision = recipe.rollout.precision
    if precision is None:
        return None
    try:
        model = UnloadedModel(recipe)
        with model.running(), torch.no_grad():
            counter = counted(lambda: model.velocity_of_rows(1))
    except UserError:
        return None
    transformer, expert = model.adapter.running, model.adapter.expert
    layers = quantisable(transformer, precision)
    by_module, root = counter.get_flop_counts(), type(model.transformer).__name__
    if expert is not None:
        root = f"{root}.{FOLDERS[expert]}"
    whole = sum(weight.numel() * model.compute.itemsize for weight in transformer.parameters())
    rounded = sum(layer.weight.numel() * model.compute.itemsize for layer in layers.values())
    return Rounding(
        precision=precision,
        layers=len(layers),
        rounded_flops=sum(sum(by_module.get(f"{root}.{name}", {}).values()) for name in layers),
        flops=counter.get_total_flops(),
        full_bytes=whole,
        rounded_bytes=whole - rounded + copy_bytes(transformer, precision),
    )
