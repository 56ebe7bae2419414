"""The family of Qwen-Image: prompts of any length under a mask,
and guidance that keeps the norm of the conditional velocity.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm

from flowgrove.models.adapter import JOINT_ATTENTION, Adapter, in_unit_range, normalised_latents
from flowgrove.models.comfyui import ATTENTION
from flowgrove.models.conditioning import Conditioning, blank_texts
from flowgrove.models.geometry import Geometry, packed_geometry, part_config
from flowgrove.recipe.schema import Model


def _text_lengths(embeds: Tensor, mask: Tensor | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Padded length, lengths [B] (the whole where nothing is marked) and bool mask, as diffusers' function gives them.

    That one brings a Python number to the device in every pass: the host waits for it, and no CUDA graph records it.
    """
    rows, padded = embeds.shape[:2]
    if mask is None:
        return padded, None, None
    if mask.shape[:2] != (rows, padded):
        raise ValueError(f"encoder_hidden_states_mask is {list(mask.shape)}: give one mask [{rows}, {padded}]")
    mask = mask.bool()
    place = torch.arange(padded, device=embeds.device)
    last = torch.where(mask, place, 0).amax(1) + 1
    return padded, torch.where(mask.any(1), last, padded), mask


class QwenImage(Adapter):
    """Qwen2.5-VL as the text encoder; states are packed latents [tokens, 4·C], each token a patch of 2×2."""

    pipeline = "QwenImagePipeline"
    published: ClassVar = {"Qwen/Qwen-Image": "qwen_image"}
    gives_table = True
    guidance_key = "guidance_embeds"
    lora_targets = JOINT_ATTENTION
    comfyui_modules = (
        rf"transformer_blocks\.\d+\.({ATTENTION}|(img|txt)_(mlp\.net\.(0\.proj|2)|mod\.1))"
        r"|img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]"
    )
    uncond_text = " "
    masks_prompts = True
    TEXT: ClassVar[tuple[str, ...]] = ("text_encoder", "tokenizer")
    LATENTS = ("latents_mean", "latents_std")

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        from diffusers.models.transformers import transformer_qwenimage

        # the transformer's forward looks it up there
        transformer_qwenimage.compute_text_seq_len_from_mask = _text_lengths

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        scale = 2 ** len(part_config(folder, "vae")["temperal_downsample"])
        return packed_geometry(model, scale, part_config(folder, "transformer")["in_channels"], 512)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [P, longest prompt, D] and their mask."""
        embeds, mask = self.pipe.encode_prompt(prompts, max_sequence_length=self.geometry.prompt_tokens)
        if mask is None:  # the pipeline's way to say that nothing is padded
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Conditioning({"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask.bool()})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings, nothing masked."""
        width = self.transformer.config.joint_attention_dim
        return Conditioning(blank_texts(rows, self.geometry.prompt_tokens, width, dtype))

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        size = self.geometry
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.embeds_guidance else None,
            img_shapes=[[(1, size.height // size.unit, size.width // size.unit)]] * len(x),
            return_dict=False,
            **cond.tensors,
        )[0]

    def guide(self, v: Tensor, v_uncond: Tensor, scale: float) -> Tensor:
        """v_u + γ(v − v_u), each token rescaled to the norm of its v."""
        guided = v_uncond + scale * (v - v_uncond)
        return guided * (vector_norm(v, dim=-1, keepdim=True) / vector_norm(guided, dim=-1, keepdim=True))

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae, size = self.pipe.vae, self.geometry
        latents = self.pipeline_class()._unpack_latents(x.to(vae.dtype), size.height, size.width, size.unit // 2)
        return in_unit_range(vae.decode(normalised_latents(vae, latents), return_dict=False)[0][:, :, 0], x.dtype)


FAMILY = QwenImage
