"""The family of HunyuanVideo-1.5 text-to-video: two texts beside the video, each under a mask.

diffusers' forward asks the device which texts are there and sorts each row by it. Tokens of text have no place, so that
their order is free: here they stay where they are, under the mask, and the host is asked nothing.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowgrove.errors import UserError
from flowgrove.models.adapter import JOINT_ATTENTION, Adapter, in_unit_range, text_tokenizer
from flowgrove.models.conditioning import Conditioning, blank_texts
from flowgrove.models.geometry import Geometry, multiple_of, part_config, video_frames
from flowgrove.models.own_forward import replace_attention, replace_forward, run_block
from flowgrove.recipe.schema import Model

FRAMES, FPS = 121, 24
SIZES = {640: (480, 848), 960: (720, 1280)}  # height and width that the pipeline draws for a target_size
GLYPHS = 256  # tokens of the quoted text, always


class HunyuanVideo15(Adapter):
    """Qwen2.5-VL, and ByT5 of what stands in quotation marks; states are latents [C, frames, h, w].

    The scale of guidance is the recipe's, whatever the folder's guider says.
    """

    pipeline = "HunyuanVideo15Pipeline"
    published: ClassVar = {"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": "hunyuan_video15_480p"}
    gives_table = True
    lora_targets = JOINT_ATTENTION
    masks_prompts = True
    TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    LATENTS = ("scaling_factor",)
    ALWAYS = ("vae",)

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        replace_forward(transformer, _forward)
        replace_attention(transformer, "HunyuanVideo15AttnProcessor2_0", _Attention)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give; quoted texts count as sources, which
        are as long in all prompts. Raises UserError for models that animate a picture, too.
        """
        transformer, vae = part_config(folder, "transformer"), part_config(folder, "vae")
        if transformer["task_type"] != "t2v":
            what = f"{folder / 'transformer' / 'config.json'} says task_type {transformer['task_type']}"
            raise UserError(f"{what}, and model.adapter hunyuan_video15 draws from text: take a t2v model")
        default = SIZES.get(transformer["target_size"], SIZES[640])
        space, time, patch = vae["spatial_compression_ratio"], vae["temporal_compression_ratio"], _patch(transformer)
        unit = space * patch[1]
        frames = video_frames(model, FRAMES, time)
        height = multiple_of("height", model.height or default[0], unit)
        width = multiple_of("width", model.width or default[1], unit)
        latent = (vae["latent_channels"], (frames - 1) // time + 1, height // space, width // space)
        tokens = (latent[1] // patch[0]) * (height // unit) * (width // unit)
        text = model.text_tokens or 1000
        return Geometry(latent, height, width, unit, frames, tokens, text, text, GLYPHS, fps=FPS)

    def tokenizers(self) -> list[tuple[Any, int]]:
        """That of Qwen alone: ByT5 reads what is quoted."""
        return [(text_tokenizer(self.pipe.tokenizer), self.geometry.prompt_tokens)]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Qwen's embeddings [P, longest prompt, D] and ByT5's [P, 256, E], zeros after the text's end, and their masks.
        A prompt that quotes nothing has no token of ByT5.
        """
        self.pipe.tokenizer_max_length = self.geometry.prompt_tokens
        embeds, mask, glyphs, glyph_mask = self.pipe.encode_prompt(list(prompts), batch_size=len(prompts))
        return Conditioning(
            {
                "encoder_hidden_states": embeds * mask.unsqueeze(-1),
                "encoder_hidden_states_mask": mask.bool(),
                "source_glyphs": glyphs * glyph_mask.unsqueeze(-1),
                "source_glyphs_mask": glyph_mask.bool(),
            }
        ).without_padding()

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings, nothing masked."""
        config = self.transformer.config
        glyphs = torch.zeros(rows, GLYPHS, config.text_embed_2_dim, dtype=dtype)
        return Conditioning(
            {
                **blank_texts(rows, self.geometry.prompt_tokens, config.text_embed_dim, dtype),
                "source_glyphs": glyphs,
                "source_glyphs_mask": torch.ones(glyphs.shape[:2], dtype=torch.bool),
            }
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, frames, h, w] in the transformer's dtype; σ reaches the model unrounded."""
        return self.transformer(x.to(self.dtype), sigma * 1000, **cond.tensors)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Videos [B, frames, 3, H, W] in [0, 1], decoded one by one: the VAE's attention takes no more."""
        vae = self.pipe.vae
        latents = x.to(vae.dtype) / vae.config.scaling_factor
        videos = torch.cat([vae.decode(one, return_dict=False)[0] for one in latents.split(1)])
        return in_unit_range(videos.transpose(1, 2), x.dtype)


FAMILY = HunyuanVideo15


def _patch(config: Any) -> tuple[int, int, int]:
    """Latents per token along frames, height and width."""
    return config["patch_size_t"], config["patch_size"], config["patch_size"]


def _forward(
    self: Any,
    x: Tensor,
    time: Tensor,
    encoder_hidden_states: Tensor,
    source_glyphs: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
    source_glyphs_mask: Tensor | None = None,
) -> Tensor:
    """HunyuanVideo15Transformer3DModel.forward for latents [B, C, frames, h, w] at `time` [B] (0 … 1000), prompts
    [B, L, D] and quoted texts [B, G, E] with their masks, or without where all is text. A video from text has no first
    frame: the channels of the condition and its mask are zeros, and no token of a picture is attended to.
    """
    patches = [size // patch for size, patch in zip(x.shape[2:], _patch(self.config), strict=True)]
    angles = self.rope(x)
    temb = self.time_embed.timestep_embedder(self.time_embed.time_proj(time).to(x.dtype))
    video = self.x_embedder(pad(x, (0,) * 7 + (self.config.in_channels - x.shape[1],)))
    kinds = self.cond_type_embed.weight
    prompts = self.context_embedder(encoder_hidden_states, time, encoder_hidden_states_mask) + kinds[0]
    text = torch.cat([self.context_embedder_2(source_glyphs) + kinds[1], prompts], dim=1)
    seen: Tensor | None = None
    if source_glyphs_mask is not None and encoder_hidden_states_mask is not None:
        seen = torch.cat([source_glyphs_mask, encoder_hidden_states_mask], dim=1)
        seen = pad(seen, (video.shape[1], 0), value=True)[:, None, None]
    for block in self.transformer_blocks:
        video, text = run_block(self, block, video, text, temb, seen, angles)
    found = self.proj_out(self.norm_out(video, temb)).unflatten(1, patches).unflatten(-1, (-1, *_patch(self.config)))
    return found.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


class _Attention:
    """Joint attention to the tokens that a mask [B, 1, 1, tokens] of keys tells. diffusers' masks queries too, which
    takes tokens² of memory; what those tokens of text become is not read.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What video and text attend to, [B, tokens, D] each."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (attn.heads, -1))

        video, text = hidden_states, encoder_hidden_states
        queries, keys = attn.norm_q(heads(attn.to_q(video))), attn.norm_k(heads(attn.to_k(video)))
        queries, keys = (apply_rotary_emb(each, image_rotary_emb, sequence_dim=1) for each in (queries, keys))
        found = dispatch_attention_fn(
            torch.cat([queries, attn.norm_added_q(heads(attn.add_q_proj(text)))], dim=1),
            torch.cat([keys, attn.norm_added_k(heads(attn.add_k_proj(text)))], dim=1),
            torch.cat([heads(attn.to_v(video)), heads(attn.add_v_proj(text))], dim=1),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        found = found.flatten(2).to(video.dtype)
        of_video, of_text = found.split([video.shape[1], text.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](of_video)), attn.to_add_out(of_text)
