"""What a model family has to provide: text in, velocity, pictures out. Everything else (guidance, batching, precision, replay) is the policy's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the transformer is told besides state and time: tensors whose first dimension is the prompt."""

    tensors: dict[str, Tensor]

    def __getitem__(self, rows: Tensor) -> "Conditioning":
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """All rows of `parts`, in order."""
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Adapter(ABC):
    """One family of pipelines. Tensors are on `device`; states are fp32 (float64 for model.dtype fp64)."""

    transformer: Any  # a diffusers ModelMixin
    latent_shape: tuple[int, ...]  # of one sample, without the batch
    tokens: int  # per row: picture and text
    lora_targets: tuple[str, ...]  # module names that published recipes adapt

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, one row per prompt; "" is the unconditional prompt."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v = dx/dσ, [B, *latent_shape], of states x at σ [B] (fp32)."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], fp32, of clean latents."""

    @abstractmethod
    def save_pipeline(self, folder: Path) -> None:
        """The whole pipeline as `from_pretrained` reads it."""

    @abstractmethod
    def save_lora(self, folder: Path) -> None:
        """The LoRA layers as `load_lora_weights` reads them."""
