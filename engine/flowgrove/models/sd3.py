"""StableDiffusion3Pipeline: SD3, SD3.5 and the embedded tiny pipeline."""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from flowgrove.models.adapter import JOINT_ATTENTION, Adapter, in_unit_range
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.parts import part_names


class SD3(Adapter):
    """Two CLIP encoders and T5; states are latents [C, h, w]."""

    pipeline = StableDiffusion3Pipeline
    lora_targets = JOINT_ATTENTION
    TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    LATENTS = ("scaling_factor", "shift_factor")
    OPTIONAL = ("text_encoder_3",)

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
        latents = x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return in_unit_range(vae.decode(latents, return_dict=False)[0], x.dtype)
