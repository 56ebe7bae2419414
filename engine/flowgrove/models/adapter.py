"""What the engine asks of a model family: prompts in, velocity, pictures out. Everything else (guidance, batching,
precision, replay) is the policy's.
"""

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flowgrove.device import to_device
from flowgrove.errors import UserError
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.experts import Experts, trained_parts
from flowgrove.models.folders import read_index
from flowgrove.models.geometry import Geometry
from flowgrove.models.stored import stored_in
from flowgrove.recipe.schema import Expert, Lora, Model

# Two pictures of 1024²: decoders need one to three kilobytes per pixel. On a CPU, what its caches bear.
PIXELS_PER_DECODE = {"cuda": 1 << 21, "cpu": 1 << 17}


JOINT_ATTENTION = (  # of blocks in which picture and text attend together
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
)  # fmt: skip


class Adapter(ABC):
    """A family of diffusers pipelines: the attributes of the class are its record, an instance is one loaded model.

    A plan reads records, so that a family's module loads torch at most, no pipeline. States are fp32 (float64 for
    model.dtype fp64). `velocity` needs the transformer alone, the rest the pipeline.
    """

    pipeline: ClassVar[str]  # the class in diffusers
    variants: ClassVar[tuple[str, ...]] = ()  # further ones that the family serves
    published: ClassVar[Mapping[str, str]] = {}  # hub repositories, each with its folder in architectures/
    dtypes: ClassVar[tuple[str, ...]] = ("bf16", "fp32")  # values of model.dtype that the transformer computes in
    gives_table: ClassVar[bool] = False  # whether the pipeline gives its scheduler 1 … 1/steps to shift, or no table
    guidance_key: ClassVar[str | None] = None  # in the transformer's configuration: guidance is an input, if true
    uncond_text: ClassVar[str] = ""  # the prompt that classifier-free guidance leads away from
    lora_targets: ClassVar[tuple[str, ...]]  # module names that published recipes adapt
    comfyui_modules: ClassVar[str] = ""  # what ComfyUI knows by the names of diffusers, as a regular expression
    source_pictures: ClassVar[tuple[int, int]] = (0, 0)  # the fewest and the most of a prompt; 0: it needs none
    source_video: ClassVar[bool] = False  # whether a prompt may have a video, as long as what is drawn
    masks_prompts: ClassVar[bool] = False  # whether prompts of different lengths stand under a mask
    attends_to_padding: ClassVar[bool] = False  # whether what that mask marks counts for less, not for nothing
    shortest_text: ClassVar[int] = 2  # tokens of an empty prompt; 2: or more
    packages: ClassVar[tuple[str, ...]] = ()  # that the parts of TEXT need beside Flowgrove's own
    TEXT: ClassVar[tuple[str, ...]]
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # encoders that a folder may leave out, text encoders with tokenizers
    PICTURE: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    ALWAYS: ClassVar[tuple[str, ...]] = ()  # parts that the pipeline asks as it is made: they are never left on disk
    LATENTS: ClassVar[tuple[str, ...]] = ()  # numbers in the VAE's configuration that `decode` needs
    vae_dtype: ClassVar[torch.dtype | None] = None  # None: as the transformer

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        self.geometry, self.transformer, self.pipe, self.folder = geometry, transformer, pipe, folder
        # which expert its passes run; at first one that trains
        self.expert: Expert | None = transformer.trained[0] if isinstance(transformer, Experts) else None
        self._of_experts: dict[Expert, Self] = {}

    @classmethod
    @abstractmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The size of a sample, from the configuration files in `folder` alone. Raises UserError for a size that the
        model cannot draw; `families.read_geometry` tells of files that are no such configuration.
        """

    @classmethod
    def takes(cls, index: dict[str, Any]) -> bool:
        """Whether the content of a model_index.json is that of this family's pipelines."""
        return index["_class_name"] in (cls.pipeline, *cls.variants)

    @classmethod
    def boundary(cls, folder: Path) -> float | None:
        """The least σ of the expert of high noise; None: the pipeline has one transformer."""
        return None

    @classmethod
    def dynamic_shift(cls, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """The mu that the pipeline gives a scheduler of this configuration, for `tokens` of a picture and so many
        steps: linear in the tokens.
        """
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        return float(least + (most - least) / (high - low) * (tokens - low))

    @classmethod
    def own_sigmas(cls, folder: Path) -> list[float] | None:
        """The σ, without the last 0, that the pipeline in `folder` gives its scheduler to shift in place of
        1 … 1/steps.
        """
        return None

    @classmethod
    def pipeline_name(cls, folder: Path) -> str:
        """Which of the family's classes in diffusers the pipeline in `folder` is of."""
        named = str(read_index(folder).get("_class_name"))
        return named if named in cls.variants else cls.pipeline

    @classmethod
    def pipeline_class(cls, folder: Path | None = None) -> Any:
        """The class of diffusers, that of the pipeline in `folder` if the family has variants."""
        import diffusers

        return getattr(diffusers, cls.pipeline if folder is None else cls.pipeline_name(folder))

    @classmethod
    def comfyui_name(cls, module: str) -> str | None:
        """What ComfyUI's loader calls a module of the transformer; None for one that it does not know."""
        return f"transformer.{module}" if re.fullmatch(cls.comfyui_modules, module) else None

    @classmethod
    def text_parts(cls) -> list[tuple[str, str]]:
        """Each tokenizer with its encoder."""
        return [(name, name.replace("tokenizer", "text_encoder")) for name in cls.TEXT if name.startswith("tokenizer")]

    @classmethod
    def parts_beside_text(cls, folder: Path) -> tuple[str, ...]:
        """What an adapter that only encodes leaves on disk; source pictures are encoded by the VAE."""
        encoded = cls.source_pictures[1] or cls.source_video
        return tuple(part for part in cls.PICTURE if part != "vae") if encoded else cls.PICTURE

    @classmethod
    def source_count(cls, model: Model) -> int:
        """The source pictures of every prompt. Raises UserError for a number that the family does not take."""
        (fewest, most), asked = cls.source_pictures, model.source_pictures
        if asked is None:
            return fewest
        if not fewest <= asked <= most:
            takes = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise UserError(f"model.source_pictures is {asked}: {model.adapter} takes {takes}")
        return asked

    @classmethod
    def sources_of(cls, model: Model) -> str:
        """What its prompts have beside their text, as a name of their encodings; "": nothing."""
        count = cls.source_count(model)
        return f"{count} and a video" if cls.source_video else str(count or "")

    def at(self, geometry: Geometry) -> Self:
        """This adapter at another size, with the same transformer and pipeline."""
        return type(self)(geometry, self.transformer, self.pipe, self.folder).of_expert(self.expert)

    def on(self, transformer: Any) -> Self:
        """This adapter of another transformer of the same configuration."""
        return type(self)(self.geometry, transformer, self.pipe, self.folder).of_expert(self.expert)

    def of_expert(self, expert: Expert | None) -> Self:
        """This adapter, whose passes run this expert; None where there is one transformer."""
        if expert in (None, self.expert):
            return self
        if expert not in self._of_experts:
            other = type(self)(self.geometry, self.transformer, self.pipe, self.folder)
            other.expert = expert
            self._of_experts[expert] = other
        return self._of_experts[expert]

    @property
    def running(self) -> Any:
        """The transformer that passes run: all of it, or the expert."""
        return self.transformer if self.expert is None else self.transformer[self.expert]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The running transformer's. Kept, because diffusers looks it up through all modules, in every pass."""
        return self.running.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one sample, without the batch."""
        return self.geometry.latent_shape

    @property
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes the guidance scale as an input (distilled guidance)
        instead of an unconditional pass.
        """
        return self.guidance_key is not None and bool(self.transformer.config.get(self.guidance_key, False))

    def needs_uncond(self, guidance_scale: float) -> bool:
        """Whether a guidance scale takes an unconditional velocity beside the prompt's.
        As in diffusers, at most 1 is no guidance.
        """
        return guidance_scale > 1 and not self.embeds_guidance

    @classmethod
    def splits_texts(cls) -> bool:
        """Whether rows of texts of one length need no mask."""
        return cls.masks_prompts and not cls.attends_to_padding

    @classmethod
    def default_negative(cls, model: Model) -> str:
        """The negative prompt of rows that have none of their own."""
        return cls.uncond_text if model.negative_prompt is None else model.negative_prompt

    @classmethod
    def ignores_guidance(cls, folder: Path) -> bool:
        """Whether the pipeline in `folder` draws without guidance, whatever its scale."""
        return False

    @classmethod
    def check_guidance(cls, folder: Path, key: str, scale: float) -> None:
        """Raises UserError for a guidance scale, given as `key`, that the pipeline in `folder` ignores."""
        if scale > 1 and cls.ignores_guidance(folder):
            why = "the model is distilled to draw without guidance"
            raise UserError(f"{key} is {scale:g}: {why}: leave it out, or take a base model")

    def samples_per_decode(self, device_type: str) -> int:
        """Samples that are decoded together."""
        return max(1, PIXELS_PER_DECODE[device_type] // self.geometry.pixels)

    def tokenizers(self) -> list[tuple[Any, int]]:
        """Those of the loaded text encoders, each with the tokens that its encoder reads of a prompt."""
        named = [name for name, encoder in self.text_parts() if getattr(self.pipe, encoder) is not None]
        asked = {named[-1]: self.geometry.prompt_tokens} if named else {}
        found = [(text_tokenizer(getattr(self.pipe, name)), asked.get(name)) for name in named]
        return [(one, min(one.model_max_length, most or one.model_max_length)) for one, most in found]

    @abstractmethod
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings, one row per prompt; `uncond_text` is the unconditional prompt. What comes of the prompts'
        source pictures and videos (`models.sources`) stands in tensors named "source_…".
        """

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
        """The whole pipeline as `from_pretrained` reads it: the trained transformers, and copies of all other parts'
        files.

        `dtypes`: of the transformer's weights by their names; the others are written as they are.
        """
        if self.folder is None:
            raise ValueError("this adapter was not loaded from a pipeline folder")
        folder.mkdir(parents=True)
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        shutil.copyfile(self.folder / "model_index.json", folder / "model_index.json")
        trained = {start.rstrip(".") or "transformer": one for start, one in trained_parts(self.transformer).items()}
        for part in index:
            if part not in trained and (self.folder / part).is_dir():
                _copy_files(self.folder / part, folder / part)
        with stored_in(self.transformer, dtypes or {}):
            for name, one in trained.items():
                one.save_pretrained(folder / name)

    def save_lora(self, folder: Path) -> None:
        """The LoRA layers as `load_lora_weights` reads them."""
        from peft import get_peft_model_state_dict

        from flowgrove.models.lora_files import write_lora

        config = self.transformer.peft_config["default"]
        lora = Lora(rank=config.r, alpha=config.lora_alpha, targets=sorted(config.target_modules))
        layers: dict[str, Tensor] = {}
        for start, part in trained_parts(self.transformer).items():
            layers |= {f"{start}{name}": tensor for name, tensor in get_peft_model_state_dict(part).items()}
        write_lora(folder, "diffusers", layers, lora, type(self))


def _copy_files(source: Path, target: Path) -> None:
    """What links point to is copied; links that lead nowhere, or round in a circle, are left out."""
    target.mkdir()
    for file in source.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def text_tokenizer(tokenizer: Any) -> Any:
    """What reads a text: a processor of texts and pictures holds a tokenizer."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def normalised_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, F, h, w] as a VAE with statistics per channel decodes them."""
    mean, std = _statistics(vae, latents)
    return latents * std + mean


def unit_latents(vae: Any, latents: Tensor) -> Tensor:
    """What such a VAE encodes, [B, C, F, h, w], as the transformer reads it: the inverse of `normalised_latents`."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) / std


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, [1, C, 1, 1, 1] each, where `like` is and in its dtype."""
    mean, std = (
        to_device(torch.tensor(values), like.device).to(like).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def scaled_and_decoded(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], of latents [B, C, h, w] of a VAE with one scale and shift."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return in_unit_range(vae.decode(latents, return_dict=False)[0], dtype)


def in_unit_range(decoded: Tensor, dtype: torch.dtype) -> Tensor:
    """What a VAE decodes, [−1, 1] → [0, 1]."""
    return (decoded.to(dtype) / 2 + 0.5).clamp(0, 1)
