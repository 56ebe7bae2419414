"""The family of FLUX.1-dev, whose transformer takes the guidance scale as an input, and FLUX.1-schnell."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowgrove.models.adapter import Adapter, scaled_and_decoded
from flowgrove.models.comfyui import EMBEDDERS, JOINT
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.geometry import Geometry, autoencoder_scale, packed_geometry, part_config
from flowgrove.recipe.schema import Model


class Flux(Adapter):
    """CLIP and T5; states are packed latents [tokens, 4·C], each token a patch of 2×2."""

    pipeline = "FluxPipeline"
    published: ClassVar = {"black-forest-labs/FLUX.1-dev": "flux1_dev"}
    gives_table = True
    guidance_key: ClassVar[str | None] = "guidance_embeds"
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    comfyui_modules = (
        rf"transformer_blocks\.\d+\.{JOINT}|x_embedder|{EMBEDDERS}"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)"
    )
    TEXT: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    LATENTS = ("scaling_factor", "shift_factor")

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        channels = part_config(folder, "transformer")["in_channels"]
        return packed_geometry(model, autoencoder_scale(folder), channels, 512, cls.source_count(model))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """T5 embeddings [P, text tokens, D] and CLIP's pooled ones."""
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, max_sequence_length=self.geometry.prompt_tokens)
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings."""
        config = self.transformer.config
        embeds = torch.zeros(rows, self.geometry.prompt_tokens, config.joint_attention_dim, dtype=dtype)
        return Conditioning(
            {
                "encoder_hidden_states": embeds,
                "pooled_projections": torch.zeros(rows, config.pooled_projection_dim, dtype=dtype),
            }
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        positions = self._positions(x.device)
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.embeds_guidance else None,
            txt_ids=positions.new_zeros(cond.tensors["encoder_hidden_states"].shape[1], 3),
            img_ids=positions,
            return_dict=False,
            **cond.tensors,
        )[0]

    def _positions(self, device: torch.device) -> Tensor:
        """(0, row, column) of every picture token, [tokens, 3]; made on the device, where diffusers' own function would
        copy them to it in every pass.
        """
        rows, columns = (side // self.geometry.unit for side in (self.geometry.height, self.geometry.width))
        row, column = torch.meshgrid(
            torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
        )
        return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).to(self.dtype)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae, size = self.pipe.vae, self.geometry
        latents = self.pipeline_class()._unpack_latents(x.to(vae.dtype), size.height, size.width, size.unit // 2)
        return scaled_and_decoded(vae, latents, x.dtype)


FAMILY = Flux
