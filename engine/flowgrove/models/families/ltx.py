"""The family of LTX-Video text-to-video: prompts read through cross-attention, under a mask."""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.models.adapter import Adapter, in_unit_range
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.geometry import Geometry, multiple_of, part_config, video_frames
from flowgrove.recipe.schema import Model

HEIGHT, WIDTH, FRAMES, FPS = 512, 704, 161, 25  # what the pipeline draws where it is told nothing

# LTX-Video's own names for those of diffusers, by which ComfyUI finds layers
_SAME = (
    r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
    r"|caption_projection\.linear_[12]|proj_out"
)
_OTHERS = {
    "proj_in": "patchify_proj",
    "time_embed.linear": "adaln_single.linear",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2": "adaln_single.emb.timestep_embedder.linear_2",
}


class LTX(Adapter):
    """T5 read through cross-attention; states are packed latents [frames · h · w, C].

    A decoder that is told a time (0.9.1 and later) is told 0 and gets latents without noise, which is the pipeline's
    default. One that adds noise within its layers (0.9.1) adds none here: what is decoded depends on the latents alone.
    """

    pipeline = "LTXPipeline"
    published: ClassVar = {"Lightricks/LTX-Video": "ltx_video"}
    gives_table = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    masks_prompts = True
    shortest_text = 1
    TEXT = ("text_encoder", "tokenizer")
    LATENTS = ("scaling_factor",)

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        if getattr(pipe, "vae", None) is not None:
            for layer in pipe.vae.decoder.modules():
                if hasattr(layer, "per_channel_scale1"):
                    layer.per_channel_scale1 = layer.per_channel_scale2 = None

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        vae = part_config(folder, "vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        space = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
        time = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
        frames = video_frames(model, FRAMES, time)
        height = multiple_of("height", model.height or HEIGHT, space)
        width = multiple_of("width", model.width or WIDTH, space)
        tokens = ((frames - 1) // time + 1) * (height // space) * (width // space)
        latent, text = (tokens, part_config(folder, "transformer")["in_channels"]), model.text_tokens or 128
        # text is read through cross-attention
        return Geometry(latent, height, width, space, frames, tokens, text, 0, fps=FPS)

    @classmethod
    def comfyui_name(cls, module: str) -> str | None:
        """LTX-Video's own name."""
        name = module if re.fullmatch(_SAME, module) else _OTHERS.get(module)
        return f"diffusion_model.{name}" if name else None

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """T5 embeddings [P, text tokens, D], zeros after the prompt's end, and their mask."""
        embeds, mask, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.geometry.prompt_tokens
        )
        embeds = embeds * mask.unsqueeze(-1)
        return Conditioning({"encoder_hidden_states": embeds, "encoder_attention_mask": mask})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings, nothing masked."""
        width = self.transformer.config.caption_channels
        embeds = torch.zeros(rows, self.geometry.prompt_tokens, width, dtype=dtype)
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
        return Conditioning({"encoder_hidden_states": embeds, "encoder_attention_mask": mask})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, C] in the transformer's dtype; σ reaches the model unrounded."""
        size, (frames, height, width) = self.geometry, self._grid()
        seconds = ((size.frames or 1) - 1) / max(frames - 1, 1) / size.fps  # between latent frames
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma * 1000,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(seconds, size.unit, size.unit),
            return_dict=False,
            **{"encoder_attention_mask": None, **cond.tensors},
        )[0]

    def _grid(self) -> tuple[int, int, int]:
        """Latents of a sample along frames, height and width."""
        size = self.geometry
        height, width = size.height // size.unit, size.width // size.unit
        return size.picture_tokens // (height * width), height, width

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos [B, frames, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        latents = x.unflatten(1, self._grid()).movedim(-1, 1)
        mean, std = (of.to(x).view(1, -1, 1, 1, 1) for of in (vae.latents_mean, vae.latents_std))
        latents = (latents * std / vae.config.scaling_factor + mean).to(vae.dtype)
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return in_unit_range(vae.decode(latents, time, return_dict=False)[0].transpose(1, 2), x.dtype)


FAMILY = LTX
