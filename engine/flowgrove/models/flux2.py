"""The family of FLUX.2-dev, whose transformer takes the guidance scale as an input."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.models.adapter import Adapter, in_unit_range
from flowgrove.models.comfyui import ATTENTION
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.geometry import Geometry, autoencoder_scale, packed_geometry, part_config
from flowgrove.recipe.schema import Model


class Flux2(Adapter):
    """Three layers of Mistral's; states are packed latents [tokens, 4·C], each token a patch of 2×2, in units of the
    VAE's batch norm.
    """

    pipeline = "Flux2Pipeline"
    published: ClassVar = {"black-forest-labs/FLUX.2-dev": "flux2_dev"}
    gives_table = True
    guidance_key = "guidance_embeds"
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj")
    comfyui_modules = (
        rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        r"|x_embedder|context_embedder|proj_out|norm_out\.linear"
    )
    TEXT = ("text_encoder", "tokenizer")
    LATENTS = ("batch_norm_eps",)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        return packed_geometry(model, autoencoder_scale(folder), part_config(folder, "transformer")["in_channels"], 512)

    @classmethod
    def dynamic_shift(cls, scheduler: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Fitted to picture tokens and steps, whatever the scheduler's configuration says; for large pictures to the
        tokens alone. Source: compute_empirical_mu of diffusers' Flux2Pipeline.
        """
        at_200 = 0.00016927 * tokens + 0.45666666
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [P, text tokens, 3·D], padding included, which the transformer reads too."""
        embeds, _ = self.pipe.encode_prompt(list(prompts), max_sequence_length=self.geometry.prompt_tokens)
        return Conditioning({"encoder_hidden_states": embeds})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the prompts' embeddings."""
        width = self.transformer.config.joint_attention_dim
        return Conditioning(
            {"encoder_hidden_states": torch.zeros(rows, self.geometry.prompt_tokens, width, dtype=dtype)}
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        text = torch.arange(cond.tensors["encoder_hidden_states"].shape[1], device=x.device)
        none = torch.zeros_like(text)
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.embeds_guidance else None,
            txt_ids=torch.stack([none, none, none, text], dim=-1),
            img_ids=self._positions(x.device),
            return_dict=False,
            **cond.tensors,
        )[0]

    def _positions(self, device: torch.device) -> Tensor:
        """(0, row, column, 0) of every picture token, [tokens, 4], made on the device."""
        _, columns = self._sides
        place = torch.arange(self.geometry.picture_tokens, device=device)
        none = torch.zeros_like(place)
        return torch.stack([none, place // columns, place % columns, none], dim=-1)

    @property
    def _sides(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.geometry.height // self.geometry.unit, self.geometry.width // self.geometry.unit

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        mean, variance = vae.bn.running_mean.view(-1, 1, 1), vae.bn.running_var.view(-1, 1, 1)
        latents = x.to(vae.dtype).transpose(1, 2).unflatten(2, self._sides)
        latents = latents * (variance + vae.config.batch_norm_eps).sqrt().to(latents) + mean.to(latents)
        latents = self.pipeline_class()._unpatchify_latents(latents)
        return in_unit_range(vae.decode(latents, return_dict=False)[0], x.dtype)


FAMILY = Flux2
