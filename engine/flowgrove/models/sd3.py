"""StableDiffusion3Pipeline: SD3, SD3.5 and the embedded tiny pipeline."""

import inspect
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter, Conditioning
from flowgrove.recipe import Model

_LONGEST_T5 = inspect.signature(StableDiffusion3Pipeline.__call__).parameters["max_sequence_length"].default


class SD3(Adapter):
    """`Adapter` of StableDiffusion3Pipeline. Raises UserError for a height or width that the model cannot draw."""

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip

    def __init__(self, folder: Path, recipe: Model, device: torch.device, weights: torch.dtype) -> None:
        self.pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=weights, local_files_only=True).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        for part in (self.pipe.vae, self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3):
            if part is not None:
                part.requires_grad_(False).eval()
        if recipe.vae_tiling:
            self.pipe.vae.enable_tiling()
        self.transformer = self.pipe.transformer
        config, scale = self.transformer.config, self.pipe.vae_scale_factor
        height, width = (size or config.sample_size * scale for size in (recipe.height, recipe.width))
        unit, most = scale * config.patch_size, config.pos_embed_max_size * scale * config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size % unit or size > most:
                raise UserError(f"model.{name} is {size}: write a multiple of {unit} up to {most}")
        self.latent_shape = (config.in_channels, height // scale, width // scale)
        self.text_tokens = _LONGEST_T5 if self.pipe.tokenizer_3 is None else min(_LONGEST_T5, self.pipe.tokenizer_3.model_max_length)
        self.tokens = (height // unit) * (width // unit) + self.pipe.tokenizer_max_length + self.text_tokens

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Text embeddings of the two CLIP encoders and T5, and the pooled ones, as the pipeline itself makes them."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens)
        return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """v [B, C, h, w] in the transformer's dtype; σ reaches the model unrounded."""
        return self.transformer(hidden_states=x.to(self.transformer.dtype), timestep=sigma * 1000, return_dict=False, **cond.tensors)[0]

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        latents = x.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return (vae.decode(latents, return_dict=False)[0].to(x.dtype) / 2 + 0.5).clamp(0, 1)

    def save_pipeline(self, folder: Path) -> None:
        self.pipe.save_pretrained(folder)

    def save_lora(self, folder: Path) -> None:
        layers = get_peft_model_state_dict(self.transformer)
        settings = self.transformer.peft_config["default"].to_dict()  # rank and alpha: without them a loader assumes alpha = rank
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings)
