"""The family of Wan2.1 and Wan2.2 image-to-video: a prompt's picture is the first frame, and a second one the last.

There are three ways in which the transformer learns of them. Wan2.1 and Wan2.2's A14B read the latents of a video that
begins with the picture, goes on in grey and ends with the second picture if there is one, and a mask of its frames, as
channels beside the state's. Wan2.1 also reads the pictures' CLIP embeddings through cross-attention: its I2V those of
one, its FLF2V those of two. Wan2.2's TI2V-5B (`expand_timesteps`) finds the picture's latent in the state itself, where
those tokens have time 0.
"""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.adapter import unit_latents
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families.wan import Wan
from flowgrove.models.folders import part_names, read_index
from flowgrove.models.geometry import Geometry, part_config
from flowgrove.models.sources import SOURCE_LATENTS, source_pictures
from flowgrove.recipe.schema import Model

_CLIP = ("image_encoder", "image_processor")
_TEXT_TOKENS = 512  # by which diffusers' attention parts them from a picture's


def _clip_tokens(folder: Path) -> int:
    """Tokens of a picture's CLIP embeddings; 0: the pipeline has no encoder of them."""
    if _CLIP[0] not in part_names(folder):
        return 0
    config = part_config(folder, _CLIP[0])
    config = config.get("vision_config", config)
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)


class WanI2V(Wan):
    """As Wan, with the pictures' latents as "source_latents" [P, C, frames, h, w] (of TI2V-5B one frame), and where the
    transformer reads them their CLIP embeddings as "source_embeds" [P, tokens, D].
    """

    pipeline = "WanImageToVideoPipeline"
    published: ClassVar = {
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan21_i2v_14b",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "wan21_i2v_14b",
        "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": "wan21_flf2v_14b",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan22_i2v_a14b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan22_ti2v_5b",
    }
    source_pictures = (1, 2)
    TEXT = (*Wan.TEXT, *_CLIP)
    OPTIONAL = _CLIP

    @classmethod
    def takes(cls, index: dict[str, object]) -> bool:
        """TI2V-5B's folder names the pipeline of text-to-video, and serves both."""
        return super().takes(index) or (index["_class_name"] == Wan.pipeline and bool(index.get("expand_timesteps")))

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """That of text-to-video. Raises UserError for a folder without the encoder that its transformer needs, too, and
        for texts of another length than that transformer takes.
        """
        transformer, pictures = part_config(folder, "transformer"), cls.source_count(model)
        kept = bool(read_index(folder).get("expand_timesteps"))
        if transformer.get("pos_embed_seq_len") and pictures == 1:
            what = f"model.path {model.path} draws between a first and a last picture"
            raise UserError(f"{what}: write model.source_pictures: 2")
        if pictures == 2 and (kept or (transformer.get("image_dim") and not transformer.get("pos_embed_seq_len"))):
            raise UserError(f"model.source_pictures is 2: {model.path} takes a first picture alone: leave it out")
        if transformer.get("image_dim"):
            if missing := [part for part in _CLIP if part not in part_names(folder)]:
                what = f"{folder / 'model_index.json'} names no {missing[0]}"
                raise UserError(f"{what}: download the whole pipeline folder")
            if model.text_tokens not in (None, _TEXT_TOKENS):
                why = f"of Wan2.1's image-to-video diffusers takes the last {_TEXT_TOKENS} tokens for the text"
                raise UserError(f"model.text_tokens is {model.text_tokens}: {why}: leave it out")
        found = super().read_geometry(folder, model)
        if (kept or pictures == 2) and found.latent_shape[1] == 1:
            why = "the first frame is the picture itself, so that nothing would train"
            if pictures == 2:
                why = "nothing lies between the two pictures"
            raise UserError(f"model.frames is {found.frames}: {why}: write 5 or more")
        return replace(found, source_read=pictures * _clip_tokens(folder), source_pictures=pictures)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """UMT5 embeddings, and what the transformer learns of each prompt's pictures."""
        found, size, vae = super().encode(prompts).tensors, self.geometry, self.pipe.vae
        pictures = [source_pictures(prompt, size.height, size.width) for prompt in prompts]
        kept, dtype = bool(self.pipe.config.expand_timesteps), found["encoder_hidden_states"].dtype
        latents = []
        for some in pictures:  # one prompt at a time: each is a video
            ends = self.pipe.video_processor.preprocess(some, height=size.height, width=size.width)
            first, *last = ends[:, :, None].to(device=vae.device, dtype=vae.dtype).split(1)
            rest = 0 if kept else (size.frames or 1) - len(some)
            video = torch.cat([first, first.new_zeros(1, 3, rest, size.height, size.width), *last], dim=2)
            latents.append(unit_latents(vae, vae.encode(video).latent_dist.mode()))
        # what stands in the state is as precise as it
        found[SOURCE_LATENTS] = torch.cat(latents) if kept else torch.cat(latents).to(dtype)
        if self.pipe.image_encoder is not None:
            embeds = [self.pipe.encode_image(some).flatten(0, 1) for some in pictures]
            found["source_embeds"] = torch.stack(embeds).to(dtype)
        return Conditioning(found)

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings and of the pictures'."""
        found, config = super().blank(rows, dtype).tensors, self.transformer.config
        channels, frames, *sides = self.latent_shape
        kept = config.in_channels == channels
        found[SOURCE_LATENTS] = torch.zeros(
            rows, channels, 1 if kept else frames, *sides, dtype=torch.float32 if kept else dtype
        )
        if config.image_dim is not None:
            found["source_embeds"] = torch.zeros(rows, self.geometry.source_read, config.image_dim, dtype=dtype)
        return Conditioning(found)

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, frames, h, w] in the transformer's dtype."""
        config, tensors = self.transformer.config, dict(cond.tensors)
        source, embeds = tensors.pop(SOURCE_LATENTS), tensors.pop("source_embeds", None)
        told = {}
        if embeds is not None:  # the model takes those of two pictures as rows of their own
            told["encoder_hidden_states_image"] = embeds.reshape(
                len(x) * self.geometry.source_pictures, -1, embeds.shape[-1]
            )
        if config.in_channels != x.shape[1]:
            known = x.new_zeros(len(x), config.in_channels - 2 * x.shape[1], *x.shape[2:])
            known[:, :, 0] = 1
            if self.geometry.source_pictures == 2:  # of the last latent frame the last of its frames
                known[:, -1, -1] = 1
            states = torch.cat([part.to(self.dtype) for part in (x, known, source)], dim=1)
            return self.run(states, sigma * 1000, tensors | told)
        _, patch_height, patch_width = config.patch_size
        frame = (x.shape[3] // patch_height) * (x.shape[4] // patch_width)
        drawn = torch.arange(frame * x.shape[2], device=x.device) >= frame
        states = torch.cat([part.to(self.dtype) for part in (source, x[:, :, 1:])], dim=2)
        v = self.run(states, sigma[:, None] * 1000 * drawn, tensors | told)
        # the first frame goes straight to the picture, whatever the weights: the pipeline puts it there at the end
        first = (x[:, :, :1] - source) / sigma.view(-1, 1, 1, 1, 1)
        return torch.cat([first.to(v.dtype), v[:, :, 1:]], dim=2)


FAMILY = WanI2V
