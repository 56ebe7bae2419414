"""WanPipeline: Wan2.1 text-to-video."""

import torch
from diffusers import WanPipeline
from torch import Tensor

from flowgrove.models.adapter import Adapter, in_unit_range, normalised_latents
from flowgrove.models.conditioning import Conditioning


class Wan(Adapter):
    """UMT5 read through cross-attention; states are latents [C, frames, h, w].
    The VAE stays fp32, as its authors run it.
    """

    pipeline = WanPipeline
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    TEXT = ("text_encoder", "tokenizer")
    LATENTS = ("latents_mean", "latents_std")
    vae_dtype = torch.float32

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
        return self.transformer(
            hidden_states=x.to(self.dtype), timestep=sigma * 1000, return_dict=False, **cond.tensors
        )[0]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos [B, frames, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        videos = vae.decode(normalised_latents(vae, x.to(vae.dtype)), return_dict=False)[0]
        return in_unit_range(videos.transpose(1, 2), x.dtype)
