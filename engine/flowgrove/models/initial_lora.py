"""The LoRA that a run starts from (model.init_lora): part of the frozen weights, or where the trained layers start."""

import re
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowgrove.errors import UserError
from flowgrove.models.experts import trained_experts, trained_parts
from flowgrove.models.families import boundary_of, configuration_folder, family_of
from flowgrove.models.folders import lora_file
from flowgrove.models.lora_reading import read_lora
from flowgrove.models.parts import model_from_config
from flowgrove.models.trainable import choose_trainable
from flowgrove.recipe.schema import Expert, InitLora, Lora, Model

_LORA_WEIGHT = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_MOST_NAMED = 8  # targets that an error lists


def check_initial_lora(model: Model) -> None:
    """Raises UserError where model.init_lora does not fit the model, whose weights are not loaded."""
    if model.init_lora is None:
        return
    folder, family = configuration_folder(model), family_of(model.adapter)
    for file in initial_files(model).values():
        with torch.device("meta"):
            transformer = model_from_config(folder, "transformer")  # that of both experts
            initial = InitialLora(model.init_lora, family, transformer, file)
            if model.lora is None or not model.trains_initial_lora:
                continue
            choose_trainable(transformer, model.lora, family.lora_targets, 0)
        initial.start(transformer, model.lora)


def initial_files(model: Model) -> dict[Expert | None, Path]:
    """The files of model.init_lora, which it has, by the experts that train; None: the one transformer. Raises
    UserError.
    """
    said = cast(InitLora, model.init_lora)
    if boundary_of(configuration_folder(model), model) is None:
        return {None: lora_file(said.path)}
    files: dict[Expert | None, Path] = {expert: lora_file(said.path, expert) for expert in trained_experts(model)}
    if len(set(files.values())) < len(files):
        what = f"{said.path} holds one file for two experts, and a file is of one"
        fix = "give a folder with two, one with low in its name, or write model.trained_experts: high, or low"
        raise UserError(f"model.init_lora.path: {what}: {fix}")
    return files


class InitialLora:
    """A file's layers by the modules of a transformer that has no LoRA yet, with the recipe's strength in their scale.

    Raises UserError for a file that does not fit them.
    """

    def __init__(self, said: InitLora, family: Any, transformer: nn.Module, file: Path | None = None) -> None:
        self.file = file = file or lora_file(said.path)
        linear = {name: part for name, part in transformer.named_modules() if isinstance(part, nn.Linear)}
        layers = read_lora(file, family, linear)
        for name, layer in layers.items():
            sides = (linear[name].out_features, linear[name].in_features)
            if (layer.b.shape[0], layer.a.shape[1]) != sides or layer.b.shape[1] != layer.rank:
                what = f"{file} holds {list(layer.b.shape)} × {list(layer.a.shape)} for {name}"
                fix = f"whose weight is {list(sides)}: give a LoRA that was made for this model"
                raise UserError(f"model.init_lora: {what}, {fix}")
        self.layers = {name: layer._replace(scale=layer.scale * said.strength) for name, layer in layers.items()}

    @classmethod
    def of(cls, model: Model, transformer: nn.Module) -> dict[str, Self]:
        """Those of a recipe, by what the names of their weights begin with in the whole transformer; without
        model.init_lora none.
        """
        if model.init_lora is None:
            return {}
        files, family = initial_files(model), family_of(model.adapter)
        parts = zip(files.values(), trained_parts(transformer).items(), strict=True)
        return {start: cls(model.init_lora, family, part, file) for file, (start, part) in parts}

    @torch.no_grad()
    def merge(self, transformer: nn.Module) -> None:
        """Adds the layers to the transformer's weights, which are rounded once. Raises UserError for quantised ones."""
        for name, layer in self.layers.items():
            linear: Any = transformer.get_submodule(name)
            weight = linear.weight
            if type(linear) is not nn.Linear or is_traceable_wrapper_subclass(weight):
                raise UserError(
                    f"model.init_lora.merge: {name} is stored quantised, and takes no change: write false, or give the "
                    "model's unquantised folder"
                )
            exact = torch.promote_types(weight.dtype, torch.float32)
            change = layer.scale * (layer.b.to(weight.device, exact) @ layer.a.to(weight.device, exact))
            weight.data = (weight.data.to(exact) + change).to(weight.dtype)  # a file's memory is never written into

    def start(self, transformer: nn.Module, lora: Lora) -> dict[str, Tensor]:
        """What the transformer's trained LoRA weights, by their names, start from: A as it is, and B scaled so that the
        change of the weights is the file's. Raises UserError for a file of other modules or another rank.
        """
        weights = [name for name, weight in transformer.named_parameters() if weight.requires_grad]
        trained = [match for name in weights if (match := _LORA_WEIGHT.fullmatch(name))]
        self._check_fit({match[1] for match in trained}, lora)
        started = {}
        for match in trained:
            layer = self.layers[match[1]]
            share = layer.scale * lora.rank / lora.alpha
            started[match[0]] = layer.a if match[2] == "A" else layer.b.to(torch.float32) * share
        return started

    def _check_fit(self, adapted: set[str], lora: Lora) -> None:
        merge = "or model.init_lora.merge: true"
        if odd := sorted(adapted ^ self.layers.keys()):
            ends = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in self.layers})
            targets = f"[{', '.join(ends)}]" if len(ends) <= _MOST_NAMED else "the names of its modules"
            lacks = "has no layer for" if odd[0] in adapted else "has a layer for"
            more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
            what = f"model.lora.targets adapts {len(adapted):,} modules, and {self.file} {lacks} {odd[0]}{more}"
            raise UserError(f"{what}: write model.lora.targets: {targets}, {merge}")
        for name, layer in self.layers.items():
            if layer.rank != lora.rank:
                what = f"model.lora.rank is {lora.rank}, and {self.file} has rank {layer.rank} ({name})"
                raise UserError(f"{what}: write model.lora.rank: {layer.rank}, {merge}")
