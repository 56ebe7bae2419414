"""A recipe's model on tensors without storage: configuration files give the shapes, PyTorch's FakeTensorMode runs the
model's own code. Memory and FLOPs are counted on it before anything is loaded.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flowgrove.errors import UserError
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.experts import as_one, transformer_folders
from flowgrove.models.families import check_split_lengths, configuration_folder, family_of, read_geometry
from flowgrove.models.frozen_base import compress_unloaded
from flowgrove.models.geometry import Geometry
from flowgrove.models.masters import Masters
from flowgrove.models.narrowing import narrow_states
from flowgrove.models.parts import is_of_a_library, model_from_config
from flowgrove.models.policy import COMPUTE_DTYPES
from flowgrove.models.trainable import choose_trainable
from flowgrove.recipe.schema import Recipe


class UnloadedModel:
    """Transformer, adapter and VAE of a recipe, made ready for training as a policy has them, at the largest of its
    sizes. What runs on them runs inside `running()`.

    `compute`: the dtype of passes; `master`: that of states and trained weights; `masters`: of bf16 passes, the trained
    weights by name; `vae_bytes`: of the VAE's weights; `doubled`: rows of a state in a pass, 2 where guidance takes an
    unconditional velocity; `together`: those in one forward, which a backward runs through. Raises UserError without
    configuration files, and where the model does not run as they describe it.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = configuration_folder(recipe.model)
        check_split_lengths(recipe)
        self.geometry = max(
            (read_geometry(self.folder, sized.model) for sized in recipe.at_sizes()), key=lambda size: size.tokens
        )
        self.compute = COMPUTE_DTYPES[recipe.model.dtype]
        self.master = torch.float64 if self.compute == torch.float64 else torch.float32
        family = family_of(recipe.model.adapter)
        with torch.device("meta"):
            parts = {name: model_from_config(self.folder, name) for name in transformer_folders(self.folder)}
            self.transformer = as_one(parts, recipe.model)
            if recipe.model.base_precision is not None:
                compress_unloaded(self.transformer, recipe.model.base_precision, self.compute)
            choose_trainable(self.transformer, recipe.model.lora, family.lora_targets, 0)
            vae = model_from_config(self.folder, "vae")
        checkpoint_blocks(self.transformer, recipe.model.gradient_checkpointing)
        if self.compute == torch.bfloat16:
            narrow_states(self.transformer)
        self._mode = FakeTensorMode()
        with self.running():
            materialise(self.transformer, self.compute, self.master)
            self.masters = Masters(self.transformer, self.compute).of if self.compute == torch.bfloat16 else {}
            self.vae_bytes = materialise(vae.requires_grad_(False), family.vae_dtype or self.compute, self.master)
            self.adapter = family(self.geometry, self.transformer, SimpleNamespace(vae=vae))
        self.doubled = 2 if self.adapter.needs_uncond(recipe.model.guidance_scale) else 1
        self.together = 1 if recipe.halves_apart else self.doubled

    def sized(self, geometry: Geometry) -> Self:
        """This model at another size."""
        other = copy.copy(self)
        other.geometry, other.adapter = geometry, self.adapter.at(geometry)
        return other

    def on(self, transformer: nn.Module) -> Self:
        """This model with another transformer of the same configuration."""
        other = copy.copy(self)
        other.transformer, other.adapter = transformer, self.adapter.on(transformer)
        return other

    def velocity(self, states: int) -> Tensor:
        """The velocity of a pass of so many states, each of the longest prompt; with guidance of both rows of each, or
        where they run apart of one.
        """
        return self.velocity_of_rows(states * self.together)

    def velocity_of_rows(self, rows: int) -> Tensor:
        """The velocity of a pass of so many rows."""
        cond = self.adapter.blank(1, self.compute)
        cond = cond.unmasked() if self.recipe.engine.split_lengths else cond
        expanded = Conditioning(
            {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in cond.tensors.items()}
        )
        x = torch.empty(rows, *self.geometry.latent_shape, dtype=self.master)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.compute == torch.bfloat16):
            return self.adapter.velocity(x, torch.empty(rows), expanded, 1.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, tensors have no storage, and what the model's code raises is a UserError."""
        with _errors_of(self.folder), self._mode:
            yield


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """What the model's code raises inside the block is a UserError: it does not run with its configuration."""
    try:
        yield
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"the model in {folder} does not run as its configuration files describe it ({reason})"
        raise UserError(f"{what}: download the folder anew") from error


def materialise(module: nn.Module, frozen: torch.dtype, trained: torch.dtype) -> int:
    """Gives a module on the meta device tensors of the mode that is on; returns their bytes."""
    total = 0
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                floating = frozen if parameter.is_floating_point() else parameter.dtype
                dtype = trained if parameter.requires_grad else floating
                part._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                )
                total += parameter.numel() * dtype.itemsize
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                total += buffer.numel() * buffer.dtype.itemsize
        for name, constant in vars(part).items():
            if isinstance(constant, Tensor):
                setattr(part, name, torch.empty(constant.shape, dtype=constant.dtype))
    return total
