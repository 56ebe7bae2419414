"""The family of FLUX.2-dev, whose transformer takes the guidance scale as an input: pictures drawn from a text, or
edited.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.models.adapter import Adapter, in_unit_range
from flowgrove.models.comfyui import ATTENTION
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.geometry import Geometry, autoencoder_scale, packed_geometry, part_config
from flowgrove.models.sources import SOURCE_LATENTS, source_pictures
from flowgrove.recipe.schema import Model

BETWEEN = 10  # on the first axis of positions, from a picture to the next


class Flux2(Adapter):
    """Three layers of Mistral's; states are packed latents [tokens, 4·C], each token a patch of 2×2, in units of the
    VAE's batch norm. Those of source pictures, each as large as what is drawn, stand behind it.
    """

    pipeline = "Flux2Pipeline"
    published: ClassVar = {"black-forest-labs/FLUX.2-dev": "flux2_dev"}
    gives_table = True
    guidance_key: ClassVar[str | None] = "guidance_embeds"
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_qkv_mlp_proj")
    comfyui_modules = (
        rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        r"|x_embedder|context_embedder|proj_out|norm_out\.linear"
    )
    source_pictures = (0, 10)
    TEXT = ("text_encoder", "tokenizer")
    LATENTS = ("batch_norm_eps",)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        channels = part_config(folder, "transformer")["in_channels"]
        return packed_geometry(model, autoencoder_scale(folder), channels, 512, cls.source_count(model))

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
        """Embeddings [P, text tokens, 3·D], padding included, which the transformer reads too, and the source
        pictures' latents [P, their tokens, 4·C].
        """
        texts, size = [str(prompt) for prompt in prompts], self.geometry
        embeds, _ = self.pipe.encode_prompt(texts, max_sequence_length=size.prompt_tokens)
        if not size.source_tokens:
            return Conditioning({"encoder_hidden_states": embeds})
        vae, pictures = self.pipe.vae, [source_pictures(prompt, size.height, size.width) for prompt in prompts]
        pixels = self.pipe.image_processor.preprocess([each for some in pictures for each in some])
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        mean, deviation = self._batch_norm()
        latents = (self.pipeline_class()._patchify_latents(latents) - mean) / deviation
        packed = latents.flatten(2).transpose(1, 2).reshape(len(prompts), size.source_tokens, -1)
        return Conditioning({"encoder_hidden_states": embeds, SOURCE_LATENTS: packed})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the prompts' embeddings and of the latents of their pictures."""
        size, width = self.geometry, self.transformer.config.joint_attention_dim
        tensors = {"encoder_hidden_states": torch.zeros(rows, size.prompt_tokens, width, dtype=dtype)}
        if size.source_tokens:
            tensors[SOURCE_LATENTS] = torch.zeros(rows, size.source_tokens, self.latent_shape[1], dtype=dtype)
        return Conditioning(tensors)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        tensors, hidden = dict(cond.tensors), x.to(self.dtype)
        if (sources := tensors.pop(SOURCE_LATENTS, None)) is not None:
            hidden = torch.cat([hidden, sources.to(self.dtype)], dim=1)
        text = torch.arange(tensors["encoder_hidden_states"].shape[1], device=x.device)
        none = torch.zeros_like(text)
        v = self.transformer(
            hidden_states=hidden,
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance_scale) if self.embeds_guidance else None,
            txt_ids=torch.stack([none, none, none, text], dim=-1),
            img_ids=self._positions(x.device),
            return_dict=False,
            **tensors,
        )[0]
        return v[:, : x.shape[1]]

    def _positions(self, device: torch.device) -> Tensor:
        """(0, row, column, 0) of what is drawn, then (10, row, column, 0) of the first source, 20 of the second …:
        [tokens, 4], made on the device.
        """
        (_, columns), drawn = self._sides, self.geometry.picture_tokens
        place = torch.arange(drawn + self.geometry.source_tokens, device=device)
        token = place % drawn
        return torch.stack(
            [place // drawn * BETWEEN, token // columns, token % columns, torch.zeros_like(place)], dim=-1
        )

    def _batch_norm(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's patches, [4·C, 1, 1] each."""
        vae = self.pipe.vae
        mean, variance = (one.to(vae.dtype).view(-1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    @property
    def _sides(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.geometry.height // self.geometry.unit, self.geometry.width // self.geometry.unit

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        mean, deviation = self._batch_norm()
        latents = x.to(vae.dtype).transpose(1, 2).unflatten(2, self._sides) * deviation + mean
        latents = self.pipeline_class()._unpatchify_latents(latents)
        return in_unit_range(vae.decode(latents, return_dict=False)[0], x.dtype)


FAMILY = Flux2
