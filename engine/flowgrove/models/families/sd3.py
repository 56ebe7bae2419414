"""The family of SD3, SD3.5 and the embedded tiny pipeline."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowgrove.models.adapter import JOINT_ATTENTION, Adapter, scaled_and_decoded
from flowgrove.models.comfyui import EMBEDDERS, JOINT
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.folders import part_names
from flowgrove.models.geometry import Geometry, autoencoder_scale, drawn_size, longest_prompt, part_config
from flowgrove.recipe.schema import Model


class SD3(Adapter):
    """Two CLIP encoders and T5; states are latents [C, h, w]."""

    pipeline = "StableDiffusion3Pipeline"
    published: ClassVar = {"stabilityai/stable-diffusion-3.5-medium": "sd35_medium"}
    dtypes = ("bf16", "fp32", "fp64")
    lora_targets = JOINT_ATTENTION
    comfyui_modules = rf"transformer_blocks\.\d+\.({JOINT}|attn2\.(to_[qkv]|to_out\.0))|pos_embed\.proj|{EMBEDDERS}"
    TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    LATENTS = ("scaling_factor", "shift_factor")
    OPTIONAL = ("text_encoder_3",)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give, and the tokenizers that are there."""
        transformer, scale = part_config(folder, "transformer"), autoencoder_scale(folder)
        unit = scale * transformer["patch_size"]
        most = transformer["pos_embed_max_size"] * unit
        height, width = drawn_size(model, transformer["sample_size"] * scale, unit, most)
        clip = longest_prompt(folder, "tokenizer", 77)
        t5 = model.text_tokens or min(256, longest_prompt(folder, "tokenizer_3", 256))
        latent = (transformer["in_channels"], height // scale, width // scale)
        return Geometry(latent, height, width, unit, None, (height // unit) * (width // unit), t5, clip + t5)

    @classmethod
    def parts_beside_text(cls, folder: Path) -> tuple[str, ...]:
        """A pipeline without T5 asks its transformer how wide the zeros in its place are."""
        return cls.PICTURE if "text_encoder_3" in part_names(folder) else ("vae",)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings of the two CLIP encoders and T5, and the pooled ones, as the pipeline itself makes them."""
        longest = self.geometry.prompt_tokens
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings."""
        config = self.transformer.config
        embeds = torch.zeros(rows, self.geometry.text_tokens, config.joint_attention_dim, dtype=dtype)
        return Conditioning(
            {
                "encoder_hidden_states": embeds,
                "pooled_projections": torch.zeros(rows, config.pooled_projection_dim, dtype=dtype),
            }
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, h, w] in the transformer's dtype; σ reaches the model unrounded."""
        return self.transformer(
            hidden_states=x.to(self.dtype), timestep=sigma * 1000, return_dict=False, **cond.tensors
        )[0]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        return scaled_and_decoded(vae, x.to(vae.dtype), x.dtype)


FAMILY = SD3
