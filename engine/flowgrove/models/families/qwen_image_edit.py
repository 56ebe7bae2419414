"""The family of Qwen-Image-Edit: pictures edited by a prompt, one (Qwen-Image-Edit) or several (2509, 2511).

The vision-language encoder sees them beside the text, at a size of its own, and the transformer reads their latents
behind those that it draws.
"""

import json
from dataclasses import replace
from functools import partial
from math import ceil, floor, sqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.adapter import unit_latents
from flowgrove.models.conditioning import Conditioning, blank_texts
from flowgrove.models.families.qwen_image import QwenImage
from flowgrove.models.geometry import Geometry
from flowgrove.models.sources import SOURCE_LATENTS, source_pictures
from flowgrove.recipe.schema import Model

_ONE, _SEVERAL = "QwenImageEditPipeline", "QwenImageEditPlusPipeline"
_AREAS = {_ONE: 1024 * 1024, _SEVERAL: 384 * 384}  # pixels of a picture as the encoder gets it
# of a processor whose file says nothing else. Source: Qwen2.5-VL's preprocessor_config.json
_PROCESSOR = {"patch_size": 14, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 12845056}


class QwenImageEdit(QwenImage):
    """Qwen-Image with "source_latents" [P, tokens of the pictures, 4·C]. Every picture is as large as what is drawn."""

    pipeline = _ONE
    variants = (_SEVERAL,)
    published: ClassVar = {
        "Qwen/Qwen-Image-Edit": "qwen_image_edit",
        "Qwen/Qwen-Image-Edit-2509": "qwen_image_edit_2509",
    }
    source_pictures = (1, 3)  # the most for which 2509's authors vouch
    packages = ("torchvision",)
    TEXT = (*QwenImage.TEXT, "processor")

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        if transformer is not None and transformer.zero_cond_t:  # no transformer: it only encodes
            _mark_sources(transformer, 1 + geometry.source_tokens // geometry.picture_tokens)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """That of Qwen-Image, with the pictures' tokens in the transformer and in the text. Raises UserError for
        several pictures of a model that takes one.
        """
        count, name = cls.source_count(model), cls.pipeline_name(folder)
        if name == _ONE and count > 1:
            what = f"model.source_pictures is {count}: a {_ONE} takes 1"
            raise UserError(f"{what}: leave it out, or take Qwen-Image-Edit-2509 or -2511")
        size = super().read_geometry(folder, model)
        read = count * _encoded_tokens(folder, *_condition_size(name, size.height, size.width))
        return replace(size, text_tokens=size.prompt_tokens + read, source_tokens=count * size.picture_tokens)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [P, longest prompt with its pictures, D], their mask, and the pictures' latents."""
        return Conditioning.cat([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        pipe, vae, size, name = self.pipe, self.pipe.vae, self.geometry, type(self.pipe).__name__
        pictures = source_pictures(prompt, size.height, size.width)
        height, width = _condition_size(name, size.height, size.width)
        seen = [pipe.image_processor.resize(picture, height, width) for picture in pictures]
        embeds, _ = pipe.encode_prompt([str(prompt)], image=seen if name == _SEVERAL else seen[0])
        embeds = embeds[:, : size.text_tokens]
        pixels = pipe.image_processor.preprocess(pictures, size.height, size.width)[:, :, None]
        latents = unit_latents(vae, vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode())
        channels, _, *sides = latents.shape[1:]
        packed = pipe._pack_latents(latents, len(pictures), channels, *sides).flatten(0, 1)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        return Conditioning(
            {
                "encoder_hidden_states": embeds,
                "encoder_hidden_states_mask": mask,
                SOURCE_LATENTS: packed.to(embeds.dtype),
            }
        )

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings and of the latents of their pictures."""
        size, width = self.geometry, self.transformer.config.joint_attention_dim
        return Conditioning(
            {
                **blank_texts(rows, size.text_tokens, width, dtype),
                SOURCE_LATENTS: torch.zeros(rows, size.source_tokens, self.latent_shape[1], dtype=dtype),
            }
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        size, tensors = self.geometry, dict(cond.tensors)
        sources = tensors.pop(SOURCE_LATENTS)
        pictures = 1 + sources.shape[1] // x.shape[1]
        timed = self.transformer.config.get("zero_cond_t")  # sources have time 0
        return self.transformer(
            hidden_states=torch.cat([x.to(self.dtype), sources.to(self.dtype)], dim=1),
            timestep=torch.cat([sigma, torch.zeros_like(sigma)]) if timed else sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.embeds_guidance else None,
            img_shapes=[[(1, size.height // size.unit, size.width // size.unit)] * pictures] * len(x),
            return_dict=False,
            **tensors,
        )[0][:, : x.shape[1]]


def _condition_size(pipeline: str, height: int, width: int) -> tuple[int, int]:
    """The size at which a picture goes to the encoder: the pipeline's area, in sides that 32 divides."""
    area, ratio = _AREAS[pipeline], width / height
    wide = sqrt(area * ratio)
    return round(wide / ratio / 32) * 32, round(wide / 32) * 32


def _encoded_tokens(folder: Path, height: int, width: int) -> int:
    """The tokens that the encoder makes of a picture, as its processor scales it."""
    said = dict(_PROCESSOR)
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := folder / "processor" / name).is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            content = content.get("image_processor", content)
            edges = content.get("size") or {}
            said |= {key: content[key] for key in _PROCESSOR if content.get(key) is not None}
            said |= {
                key: edges[edge]
                for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
                if edge in edges
            }
    unit = said["patch_size"] * said["merge_size"]
    rows, columns = round(height / unit), round(width / unit)
    pixels = rows * columns * unit * unit
    if pixels > said["max_pixels"]:
        scale = sqrt(height * width / said["max_pixels"]) * unit
        rows, columns = max(1, floor(height / scale)), max(1, floor(width / scale))
    elif pixels < said["min_pixels"]:
        scale = sqrt(said["min_pixels"] / (height * width)) / unit
        rows, columns = ceil(height * scale), ceil(width * scale)
    return int(rows * columns)


def _mark_sources(transformer: Any, pictures: int) -> None:
    """Blocks of a transformer with zero_cond_t learn on the device which tokens are the sources': those behind the
    first of so many `pictures`. Its own forward brings a list to the device in every pass: the host waits for it, and
    no CUDA graph records it.
    """
    transformer.zero_cond_t = False
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(partial(_with_index, pictures), with_kwargs=True)
    transformer.norm_out.register_forward_pre_hook(_of_the_drawn)


_INDEX = 6  # the place of modulate_index among a block's arguments, which checkpointing gives by their order


def _with_index(
    pictures: int, block: Any, args: tuple[Any, ...], told: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[0] if args else told["hidden_states"]
    tokens = hidden.shape[1]
    index = (torch.arange(tokens, device=hidden.device) >= tokens // pictures).int().expand(len(hidden), -1)
    if len(args) > _INDEX:
        return (*args[:_INDEX], index, *args[_INDEX + 1 :]), told
    return args, {**told, "modulate_index": index}


def _of_the_drawn(norm: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The last norm's time is that of what is drawn, the first half of the rows."""
    hidden, time = args
    return hidden, time.chunk(2)[0]


FAMILY = QwenImageEdit
