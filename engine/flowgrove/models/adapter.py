"""What the engine asks of a model family: prompts in, velocity, pictures out. Everything else (guidance, batching,
precision, replay) is the policy's.
"""

import json
import shutil
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from torch import Tensor

from flowgrove.device import to_device
from flowgrove.errors import UserError
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.geometry import Geometry, read_geometry
from flowgrove.models.lora_files import write_lora
from flowgrove.models.parts import check_statistics, check_tokenizer, load_part, part_names
from flowgrove.models.stored import stored_in
from flowgrove.recipe.schema import Lora, Model

# Two pictures of 1024²: decoders need one to three kilobytes per pixel. On a CPU, what its caches bear.
PIXELS_PER_DECODE = {"cuda": 1 << 21, "cpu": 1 << 17}


JOINT_ATTENTION = (  # of blocks in which picture and text attend together
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


class Adapter(ABC):
    """One family of diffusers pipelines. States are fp32 (float64 for model.dtype fp64). `velocity` needs the
    transformer alone, the rest the pipeline.
    """

    pipeline: ClassVar[type[DiffusionPipeline]]
    lora_targets: ClassVar[tuple[str, ...]]  # module names that published recipes adapt
    masks_prompts: ClassVar[bool] = False  # whether prompts of different lengths stand under a mask
    uncond_text: ClassVar[str] = ""  # the prompt that guidance leads away from
    TEXT: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # text encoders that a folder may leave out, with their tokenizers
    PICTURE: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    LATENTS: ClassVar[tuple[str, ...]] = ()  # numbers in the VAE's configuration that `decode` needs
    vae_dtype: ClassVar[torch.dtype | None] = None  # None: as the transformer
    fps: ClassVar[int] = 16  # of videos, as files

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        self.geometry, self.transformer, self.pipe, self.folder = geometry, transformer, pipe, folder

    @classmethod
    def load(
        cls, folder: Path, recipe: Model, device: torch.device, weights: torch.dtype, without: tuple[str, ...] = ()
    ) -> Self:
        """The pipeline in `folder`, frozen, on `device`.

        `without` names parts that are left on disk: `TEXT` for an adapter that need not encode, `parts_beside_text` for
        one that does nothing else.
        """
        geometry = read_geometry(folder, recipe)
        dtypes = {}
        if weights != torch.float64:
            if recipe.lora is None:  # all of it trains: masters as precise as the files
                dtypes["transformer"] = torch.float32
            if cls.vae_dtype is not None:
                dtypes["vae"] = cls.vae_dtype
        named = part_names(folder)
        cls._check_parts(folder, named)
        parts: dict[str, Any] = dict.fromkeys(cls.TEXT)
        parts |= {
            name: None if name in without else load_part(folder, name, dtypes.get(name, weights)) for name in named
        }
        for tokenizer, encoder in cls._text_parts():
            if parts.get(encoder) is not None:
                check_tokenizer(folder / tokenizer, parts[tokenizer], parts[encoder])
        if parts.get("vae") is not None:
            check_statistics(folder / "vae", parts["vae"], cls.LATENTS)
        pipe = cls.pipeline.from_pretrained(folder, local_files_only=True, **parts).to(device)
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        if "vae" not in without and recipe.vae_tiling:
            pipe.vae.enable_tiling()
        return cls(geometry, pipe.transformer, pipe, folder)

    @classmethod
    def _check_parts(cls, folder: Path, named: list[str]) -> None:
        """Raises UserError if a part is left out of model_index.json that the family does not run without."""
        optional = [pair for pair in cls._text_parts() if pair[1] in cls.OPTIONAL and pair[1] not in named]
        needed = {"scheduler", *cls.PICTURE, *cls.TEXT} - {name for pair in optional for name in pair}
        if missing := sorted(needed - set(named)):
            raise UserError(f"{folder / 'model_index.json'} names no {missing[0]}: download the whole pipeline folder")

    @classmethod
    def _text_parts(cls) -> list[tuple[str, str]]:
        """Each tokenizer with its encoder."""
        return [(name, name.replace("tokenizer", "text_encoder")) for name in cls.TEXT if name.startswith("tokenizer")]

    @classmethod
    def parts_beside_text(cls, folder: Path) -> tuple[str, ...]:
        """What an adapter that only encodes leaves on disk."""
        return cls.PICTURE

    def sized(self, recipe: Model) -> Self:
        """This adapter at the height and width of `recipe`, with the same transformer and pipeline.
        Raises UserError.
        """
        if self.folder is None:
            raise ValueError("this adapter was not loaded from a pipeline folder")
        return type(self)(read_geometry(self.folder, recipe), self.transformer, self.pipe, self.folder)

    def on(self, transformer: Any) -> Self:
        """This adapter of another transformer of the same configuration."""
        return type(self)(self.geometry, transformer, self.pipe, self.folder)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The transformer's. Kept, because diffusers looks it up through all modules, in every pass."""
        return self.transformer.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch."""
        return self.geometry.latent_shape

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input (distilled guidance)
        instead of an unconditional pass.
        """
        return bool(self.transformer.config.get("guidance_embeds", False))

    def needs_uncond(self, guidance_scale: float) -> bool:
        """Whether a guidance scale takes an unconditional velocity beside the prompt's.
        As in diffusers, at most 1 is no guidance.
        """
        return guidance_scale > 1 and not self.embeds_guidance

    def samples_per_decode(self, device_type: str) -> int:
        """Samples that are decoded together."""
        return max(1, PIXELS_PER_DECODE[device_type] // self.geometry.pixels)

    def tokenizers(self) -> list[tuple[Any, int]]:
        """Those of the loaded text encoders, each with the tokens that its encoder reads of a prompt."""
        named = [name for name, encoder in self._text_parts() if getattr(self.pipe, encoder) is not None]
        asked = {named[-1]: self.geometry.prompt_tokens} if named else {}
        found = [(getattr(self.pipe, name), asked.get(name)) for name in named]
        return [(one, min(one.model_max_length, most or one.model_max_length)) for one, most in found]

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, one row per prompt; `uncond_text` is the unconditional prompt."""

    @abstractmethod
    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings: what a pass costs can be known without encoders."""

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v = dx/dσ, [B, *latent_shape], of states x at σ [B] (fp32).
        `guidance_scale` matters only where `embeds_guidance`.
        """

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1] of clean latents, in their dtype."""

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> Tensor | None:
        """The guided velocity, differentiable, where the family does not use v_u + γ(v − v_u),
        which the fused ops apply themselves.
        """
        return None

    def save_pipeline(self, folder: Path, dtypes: dict[str, torch.dtype] | None = None) -> None:
        """The whole pipeline as `from_pretrained` reads it: the trained transformer, and copies of all other parts'
        files.

        `dtypes`: of the transformer's weights by their names; the others are written as they are.
        """
        if self.folder is None:
            raise ValueError("this adapter was not loaded from a pipeline folder")
        folder.mkdir(parents=True)
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        for part in index:
            if part != "transformer" and (self.folder / part).is_dir():
                _copy_files(self.folder / part, folder / part)
        with stored_in(self.transformer, dtypes or {}):
            self.transformer.save_pretrained(folder / "transformer")

    def save_lora(self, folder: Path) -> None:
        """The LoRA layers as `load_lora_weights` reads them."""
        config = self.transformer.peft_config["default"]
        lora = Lora(rank=config.r, alpha=config.lora_alpha, targets=sorted(config.target_modules))
        write_lora(folder, "diffusers", get_peft_model_state_dict(self.transformer), lora, type(self))


def _copy_files(source: Path, target: Path) -> None:
    """What links point to is copied; links that lead nowhere, or round in a circle, are left out."""
    target.mkdir()
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def normalised_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] as a VAE with statistics per channel decodes them."""
    mean, std = (
        to_device(torch.tensor(values), latents.device).to(latents).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latents * std + mean


def in_unit_range(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """What a VAE decodes, [−1, 1] → [0, 1]."""
    return (decoded.to(dtype) / 2 + 0.5).clamp(0, 1)
