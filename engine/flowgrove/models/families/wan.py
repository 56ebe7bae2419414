"""The family of Wan2.1 and Wan2.2 text-to-video."""

import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter, in_unit_range, normalised_latents
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.experts import FOLDERS, transformer_folders
from flowgrove.models.folders import read_index
from flowgrove.models.geometry import Geometry, multiple_of, part_config, video_frames
from flowgrove.recipe.schema import Model

# Wan's own names for those of diffusers, by which ComfyUI finds layers
_LAYERS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img",
    "net.0.proj": "0", "net.2": "2",
}  # fmt: skip
_GROUPS = {"attn1": "self_attn", "attn2": "cross_attn", "ffn": "ffn"}
_OTHERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "proj_out": "head.head",
}


class _Size(NamedTuple):
    """That of a video, where a recipe says nothing of it."""

    height: int
    width: int
    frames: int
    fps: int


_OF_T2V, _OF_TI2V = _Size(480, 832, 81, 16), _Size(704, 1280, 121, 24)


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    """A transformer's configuration without what the library notes of itself."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


class Wan(Adapter):
    """UMT5 read through cross-attention; states are latents [C, frames, h, w].
    The VAE stays fp32, as its authors run it.

    A pipeline with `expand_timesteps` (TI2V-5B) gives every token a time of its own, which for a video from text is
    the same for all: a row gets one time here, and the model broadcasts it.
    """

    pipeline = "WanPipeline"
    published: ClassVar = {
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21_1_3b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan22_ti2v_5b",
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "wan22_t2v_a14b",
    }
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    TEXT: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    LATENTS = ("latents_mean", "latents_std")
    vae_dtype = torch.float32

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give.
        Raises UserError for two experts that differ, too.
        """
        index = read_index(folder)
        # what the authors draw with
        default = _OF_TI2V if index.get("expand_timesteps") else _OF_T2V
        transformer, vae = part_config(folder, FOLDERS["high"]), part_config(folder, "vae")
        if cls.boundary(folder) is not None and _shape(part_config(folder, FOLDERS["low"])) != _shape(transformer):
            what = f"{folder / FOLDERS['low'] / 'config.json'} describes another transformer than {FOLDERS['high']}"
            raise UserError(f"{what}, and experts are alike: download the whole pipeline folder")
        space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
        _, patch_height, patch_width = transformer["patch_size"]
        frames = video_frames(model, default.frames, time)
        height = multiple_of("height", model.height or default.height, space * patch_height)
        width = multiple_of("width", model.width or default.width, space * patch_width)
        latent = (vae["z_dim"], (frames - 1) // time + 1, height // space, width // space)
        tokens = latent[1] * (latent[2] // patch_height) * (latent[3] // patch_width)
        # text is read through cross-attention
        text, unit = model.text_tokens or 512, space * patch_height
        return Geometry(latent, height, width, unit, frames, tokens, text, 0, fps=default.fps)

    @classmethod
    def boundary(cls, folder: Path) -> float | None:
        """The pipeline's boundary_ratio: times and σ are proportional."""
        ratio = read_index(folder).get("boundary_ratio")
        return None if ratio is None else float(ratio)

    @classmethod
    def parts_beside_text(cls, folder: Path) -> tuple[str, ...]:
        """What an adapter that only encodes leaves on disk."""
        second = [name for name in transformer_folders(folder) if name == FOLDERS["low"]]
        return (*super().parts_beside_text(folder), *second)

    @classmethod
    def comfyui_name(cls, module: str) -> str | None:
        """Wan's own name."""
        block = re.fullmatch(r"((?:vace_)?blocks\.\d+)\.(attn1|attn2|ffn)\.(.+)", module)
        if block is not None and block[3] in _LAYERS:
            return f"diffusion_model.{block[1]}.{_GROUPS[block[2]]}.{_LAYERS[block[3]]}"
        if (read := re.fullmatch(r"(vace_blocks\.\d+)\.proj_(in|out)", module)) is not None:
            return f"diffusion_model.{read[1]}.{'before' if read[2] == 'in' else 'after'}_proj"
        return f"diffusion_model.{_OTHERS[module]}" if module in _OTHERS else None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """UMT5 embeddings [P, text tokens, D], zeros after the prompt's end."""
        embeds, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.geometry.prompt_tokens
        )
        return Conditioning({"encoder_hidden_states": embeds})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings."""
        return Conditioning(
            {
                "encoder_hidden_states": torch.zeros(
                    rows, self.geometry.prompt_tokens, self.transformer.config.text_dim, dtype=dtype
                )
            }
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, frames, h, w] in the transformer's dtype; σ reaches the model unrounded."""
        return self.run(x.to(self.dtype), sigma * 1000, cond.tensors)

    def run(self, states: Tensor, times: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """What the transformer gives, or the expert that passes run."""
        which = {} if self.expert is None else {"expert": self.expert}
        found: Tensor = self.transformer(hidden_states=states, timestep=times, return_dict=False, **which, **tensors)[0]
        return found

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos [B, frames, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        videos = vae.decode(normalised_latents(vae, x.to(vae.dtype)), return_dict=False)[0]
        return in_unit_range(videos.transpose(1, 2), x.dtype)


FAMILY = Wan
