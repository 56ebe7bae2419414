"""The family of Wan2.1 and Wan2.2 image-to-video: a prompt's picture is the first frame.

There are three ways in which the transformer learns of it. Wan2.1 and Wan2.2's A14B read the latents of a video that
begins with the picture and goes on in grey, and a mask of its frames, as channels beside the state's. Wan2.1 also
reads the picture's CLIP embeddings through cross-attention. Wan2.2's TI2V-5B (`expand_timesteps`) finds the picture's
latent in the state itself, where those tokens have time 0.
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
    """As Wan, with the picture's latents as "source_latents" [P, C, frames, h, w] (of TI2V-5B one frame), and where the
    transformer reads them its CLIP embeddings as "source_embeds" [P, tokens, D].
    """

    pipeline = "WanImageToVideoPipeline"
    published: ClassVar = {
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": "wan21_i2v_14b",
        "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": "wan21_i2v_14b",
        "Wan-AI/Wan2.2-I2V-A14B-Diffusers": "wan22_i2v_a14b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "wan22_ti2v_5b",
    }
    source_pictures = (1, 1)
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
        transformer = part_config(folder, "transformer")
        if transformer.get("pos_embed_seq_len"):
            why = "draws between a first and a last picture, which wan_i2v does not"
            raise UserError(f"model.path {model.path} {why}: give a pipeline of image-to-video")
        if transformer.get("image_dim"):
            if missing := [part for part in _CLIP if part not in part_names(folder)]:
                what = f"{folder / 'model_index.json'} names no {missing[0]}"
                raise UserError(f"{what}: download the whole pipeline folder")
            if model.text_tokens not in (None, _TEXT_TOKENS):
                why = f"of Wan2.1's image-to-video diffusers takes the last {_TEXT_TOKENS} tokens for the text"
                raise UserError(f"model.text_tokens is {model.text_tokens}: {why}: leave it out")
        found = super().read_geometry(folder, model)
        if read_index(folder).get("expand_timesteps") and found.latent_shape[1] == 1:
            raise UserError(
                f"model.frames is {found.frames}: the first frame is the picture itself, so that nothing would train: "
                "write 5 or more"
            )
        return replace(found, source_read=_clip_tokens(folder))

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """UMT5 embeddings, and what the transformer learns of each prompt's picture."""
        found, size, vae = super().encode(prompts).tensors, self.geometry, self.pipe.vae
        pictures = [source_pictures(prompt, size.height, size.width)[0] for prompt in prompts]
        kept, dtype = bool(self.pipe.config.expand_timesteps), found["encoder_hidden_states"].dtype
        latents = []
        for picture in pictures:  # one at a time: each is a video
            first = self.pipe.video_processor.preprocess(picture, height=size.height, width=size.width)
            first = first[:, :, None].to(device=vae.device, dtype=vae.dtype)
            rest = 0 if kept else (size.frames or 1) - 1
            video = torch.cat([first, first.new_zeros(1, 3, rest, size.height, size.width)], dim=2)
            latents.append(unit_latents(vae, vae.encode(video).latent_dist.mode()))
        # what stands in the state is as precise as it
        found[SOURCE_LATENTS] = torch.cat(latents) if kept else torch.cat(latents).to(dtype)
        if self.pipe.image_encoder is not None:
            embeds = [self.pipe.encode_image(picture) for picture in pictures]
            found["source_embeds"] = torch.cat(embeds).to(dtype)
        return Conditioning(found)

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings and of a picture's."""
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
        told = {} if embeds is None else {"encoder_hidden_states_image": embeds}
        if config.in_channels != x.shape[1]:
            known = x.new_zeros(len(x), config.in_channels - 2 * x.shape[1], *x.shape[2:])
            known[:, :, 0] = 1
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
