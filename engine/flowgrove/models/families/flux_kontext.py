"""The family of FLUX.1-Kontext-dev: pictures edited by a prompt."""

from typing import ClassVar

import torch
from torch import Tensor

from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families.flux import Flux
from flowgrove.models.sources import SOURCE_LATENTS, source_pictures


class FluxKontext(Flux):
    """FLUX.1 whose transformer reads the source picture's packed latents behind those that it draws."""

    pipeline = "FluxKontextPipeline"
    published: ClassVar = {"black-forest-labs/FLUX.1-Kontext-dev": "flux1_kontext_dev"}
    source_pictures = (1, 1)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """What FLUX.1 reads, and the source pictures' latents [P, tokens, 4·C]."""
        vae, size = self.pipe.vae, self.geometry
        pictures = [source_pictures(prompt, size.height, size.width)[0] for prompt in prompts]
        pixels = self.pipe.image_processor.preprocess(pictures, size.height, size.width).to(vae.device, vae.dtype)
        mode = vae.encode(pixels).latent_dist.mode()
        latents = (mode - vae.config.shift_factor) * vae.config.scaling_factor
        packed = self.pipeline_class()._pack_latents(latents, len(latents), *latents.shape[1:])
        return Conditioning({**super().encode(prompts).tensors, SOURCE_LATENTS: packed})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings and of the latents of a picture."""
        return Conditioning(
            {**super().blank(rows, dtype).tensors, SOURCE_LATENTS: torch.zeros(rows, *self.latent_shape, dtype=dtype)}
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        tensors = dict(cond.tensors)
        sources = tensors.pop(SOURCE_LATENTS)
        both = torch.cat([x.to(sources.dtype), sources], dim=1)
        return super().velocity(both, sigma, Conditioning(tensors), guidance_scale)[:, : x.shape[1]]

    def _positions(self, device: torch.device) -> Tensor:
        """(0, row, column) of what is drawn, then (1, row, column) of the source, [2·tokens, 3]."""
        drawn = super()._positions(device)
        source = drawn.clone()
        source[:, 0] = 1
        return torch.cat([drawn, source])


FAMILY = FluxKontext
