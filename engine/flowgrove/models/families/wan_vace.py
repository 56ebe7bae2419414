"""The family of Wan2.1 VACE: a video from a prompt's video, a mask of it and reference pictures, or some of them.

The transformer has further blocks that read a second video beside the state: the latents of what the mask keeps of the
source, of what it leaves to be drawn anew, and the mask itself. Reference pictures stand before both as frames of their
own, which the state has too and which are dropped when it is decoded.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from flowgrove.data.prompt import pictures_of
from flowgrove.models.adapter import unit_latents
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families.wan import Wan
from flowgrove.models.geometry import Geometry
from flowgrove.models.sources import SOURCE_LATENTS, source_mask, source_video
from flowgrove.recipe.schema import Model

_MASK = "source_mask"


class WanVace(Wan):
    """As Wan; states are latents [C, pictures + frames, h, w]. What is read beside them are "source_latents"
    [P, 2 · C, pictures + frames, h, w] and "source_mask" [P, pixels of a latent, pictures + frames, h, w], uint8.
    """

    pipeline = "WanVACEPipeline"
    published: ClassVar = {
        "Wan-AI/Wan2.1-VACE-1.3B-diffusers": "wan21_vace_1_3b",
        "Wan-AI/Wan2.1-VACE-14B-diffusers": "wan21_vace_14b",
    }
    source_pictures = (0, 16)
    source_video = True

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """That of text-to-video, with a frame of latents for each reference picture."""
        found, pictures = super().read_geometry(folder, model), cls.source_count(model)
        channels, frames, *sides = found.latent_shape
        tokens = found.picture_tokens // frames * (frames + pictures)
        return replace(
            found,
            latent_shape=(channels, frames + pictures, *sides),
            picture_tokens=tokens,
            source_pictures=pictures,
        )

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """UMT5 embeddings, and what the transformer reads of each prompt's video, mask and pictures."""
        found = super().encode(prompts).tensors
        sources, masks = zip(*(self._sources(prompt) for prompt in prompts), strict=True)
        found[SOURCE_LATENTS] = torch.cat(sources).to(found["encoder_hidden_states"].dtype)
        found[_MASK] = torch.cat(masks)
        return Conditioning(found)

    def _sources(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Latents [1, 2 · C, pictures + frames, h, w] of a prompt's sources, and its mask."""
        height, width, vae = self.geometry.height, self.geometry.width, self.pipe.vae
        frames, masked = source_video(prompt, height, width), source_mask(prompt, height, width)
        video = torch.zeros(1, 3, self.geometry.frames or 1, height, width)
        if frames is not None:
            video = self.pipe.video_processor.preprocess_video(frames, height=height, width=width)
        anew = (
            torch.ones_like(video[:, :1]) if masked is None else torch.cat([_white(frame) for frame in masked], dim=2)
        )
        kept = self._grey if masked is None else self._latents(video * (1 - anew))
        latents = torch.cat([kept, self._latents(video * anew)], dim=1)
        pictures = [self._latents(self._canvas(picture.load())) for picture in reversed(pictures_of(prompt))]
        pictures = [torch.cat([latent, torch.zeros_like(latent)], dim=1) for latent in pictures]
        _, count, *sides = self.latent_shape
        cells = anew.view(-1, sides[0], height // sides[0], sides[1], width // sides[1]).permute(2, 4, 0, 1, 3)
        mask = interpolate(cells.flatten(0, 1)[None], size=(count - len(pictures), *sides), mode="nearest-exact")
        known = mask.new_zeros(1, mask.shape[1], len(pictures), *sides)
        mask = torch.cat([known, mask], dim=2).to(device=vae.device, dtype=torch.uint8)
        return torch.cat([*pictures, latents], dim=2), mask

    def _latents(self, video: Tensor) -> Tensor:
        """Those of a video [1, 3, frames, H, W] in [−1, 1]."""
        vae = self.pipe.vae
        return unit_latents(vae, vae.encode(video.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode())

    @cached_property
    def _grey(self) -> Tensor:
        """The latents of a video of which nothing is kept."""
        return self._latents(torch.zeros(1, 3, self.geometry.frames or 1, self.geometry.height, self.geometry.width))

    def _canvas(self, picture: Image.Image) -> Tensor:
        """A reference picture whole on white, [1, 3, 1, H, W] in [−1, 1], scaled as the pipeline does."""
        size = self.geometry
        pixels = self.pipe.video_processor.preprocess(picture)
        scale = min(size.height / pixels.shape[2], size.width / pixels.shape[3])
        height, width = int(pixels.shape[2] * scale), int(pixels.shape[3] * scale)
        top, left = (size.height - height) // 2, (size.width - width) // 2
        canvas = torch.ones(1, 3, size.height, size.width)
        scaled = interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
        canvas[:, :, top : top + height, left : left + width] = scaled
        return canvas[:, :, None]

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings and of what is read of the sources."""
        found = super().blank(rows, dtype).tensors
        channels, *shape = self.latent_shape
        found[SOURCE_LATENTS] = torch.zeros(rows, 2 * channels, *shape, dtype=dtype)
        cells = self.transformer.config.vace_in_channels - 2 * channels
        found[_MASK] = torch.zeros(rows, cells, *shape, dtype=torch.uint8)
        return Conditioning(found)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, pictures + frames, h, w] in the transformer's dtype."""
        tensors = dict(cond.tensors)
        read = [tensors.pop(name).to(self.dtype) for name in (SOURCE_LATENTS, _MASK)]
        return self.run(x.to(self.dtype), sigma * 1000, tensors | {"control_hidden_states": torch.cat(read, dim=1)})

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos [B, frames, 3, H, W] in [0, 1]."""
        return super().decode(x[:, :, self.geometry.source_pictures :])


def _white(frame: Image.Image) -> Tensor:
    """Where a frame of a mask is rather white than black, [1, 1, 1, H, W] of 1 and 0."""
    grey = frame.convert("L")
    levels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, 1, grey.height, grey.width)
    return (levels > 127).float()


FAMILY = WanVace
