"""The family of Qwen-Image-2.1: one stream of text and picture. Text reads the text before it, the picture reads all.

diffusers' forward asks the device where a row's pictures stand, and gives all rows of a batch the places of the longest
text. Here each row has its own, and nothing is asked.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter, in_unit_range, normalised_latents
from flowgrove.models.conditioning import Conditioning, blank_texts
from flowgrove.models.folders import read_index
from flowgrove.models.geometry import Geometry, drawn_size, part_config
from flowgrove.models.own_forward import replace_attention, replace_forward, run_block
from flowgrove.recipe.schema import Model

_TEXT_TOKENS = 1024  # the pipeline itself reads prompts of any length


class QwenImage21(Adapter):
    """Qwen3-VL as the text encoder; states are latents [tokens, C], each token one of 16 × 16 pixels.

    The VAE decodes pictures with an alpha channel, which stand on white here.
    """

    pipeline = "QwenImage21Pipeline"
    gives_table = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    uncond_text = " "
    masks_prompts = True
    packages = ("torchvision",)
    TEXT = ("text_encoder", "processor")
    ALWAYS = ("processor",)
    LATENTS = ("latents_mean", "latents_std")

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        replace_forward(transformer, _forward)
        replace_attention(transformer, "QwenImage21AttnProcessor", _Attention)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """The geometry that the transformer's and the VAE's configuration give."""
        unit = 2 ** len(part_config(folder, "vae")["temperal_downsample"])
        height, width = drawn_size(model, 1024, 2 * unit)
        tokens, text = (height // unit) * (width // unit), model.text_tokens or _TEXT_TOKENS
        channels = part_config(folder, "transformer")["in_channels"]
        return Geometry((tokens, channels), height, width, unit, None, tokens, text, text)

    @classmethod
    def own_sigmas(cls, folder: Path) -> list[float] | None:
        """The table of a model that is made for some steps. Raises UserError for what is none."""
        own = read_index(folder).get("sample_sigmas")
        if own and not (isinstance(own, list) and all(isinstance(sigma, int | float) for sigma in own)):
            file = folder / "model_index.json"
            raise UserError(f"{file} has sample_sigmas that are no list of numbers: download the file anew")
        return own or None

    @classmethod
    def text_parts(cls) -> list[tuple[str, str]]:
        """The processor's tokenizer."""
        return [("processor", "text_encoder")]

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [P, longest prompt, D], zeros after the text's end, and their mask."""
        embeds, mask, _ = self.pipe.encode_prompt([str(prompt) for prompt in prompts])
        if mask is None:  # the pipeline's way to say that nothing is padded
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        longest = self.geometry.prompt_tokens
        return Conditioning(
            {
                "encoder_hidden_states": embeds[:, :longest],
                "encoder_hidden_states_mask": mask[:, :longest].bool(),
            }
        )

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings, nothing masked."""
        width = self.transformer.config.context_in_dim
        return Conditioning(blank_texts(rows, self.geometry.prompt_tokens, width, dtype))

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, C] in the transformer's dtype; σ reaches the model unrounded."""
        return self.transformer(x.to(self.dtype), sigma, grid=self._grid(), **cond.tensors)

    def _grid(self) -> tuple[int, int]:
        """Tokens of a picture along height and width."""
        size = self.geometry
        return size.height // size.unit, size.width // size.unit

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        latents = x.transpose(1, 2).unflatten(2, (1, *self._grid())).to(vae.dtype)
        drawn = in_unit_range(vae.decode(normalised_latents(vae, latents), return_dict=False)[0][:, :, 0], x.dtype)
        colours, alpha = drawn[:, :3], drawn[:, 3:]
        return colours * alpha + (1 - alpha) if alpha.shape[1] else colours


FAMILY = QwenImage21


def _forward(
    self: Any,
    x: Tensor,
    sigma: Tensor,
    grid: tuple[int, int],
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Tensor:
    """QwenImage21Transformer2DModel.forward for latents [B, T, C] of `grid` tokens at σ [B], and prompts [B, L, D]
    whose mask [B, L] marks their tokens, which stand first; None: all.
    """
    picture, text = self.img_in(x), self.txt_in(encoder_hidden_states)
    length, seen = text.shape[1], encoder_hidden_states_mask
    lengths = torch.full((1, 1), length, device=x.device) if seen is None else seen.sum(1, keepdim=True)
    angles = _angles(self.pos_embed, length, lengths, grid)
    is_picture: Tensor | None = None
    if self.config.causal_condition:  # the text stands at time 0, in all rows
        is_picture = torch.arange(length + x.shape[1], device=x.device) >= length
        sigma = torch.cat([sigma, sigma.new_zeros(1)])
    temb = self.time_text_embed(sigma, picture)
    modulation = self.modulation(temb)
    if seen is not None:
        seen = torch.cat([seen, seen.new_ones(x.shape[:2])], dim=1)[:, None, None]
    both = torch.cat([text, picture], dim=1)
    for block in self.transformer_blocks:
        # after the mask: which tokens are the picture's, nothing of a cache, and how many are the text's
        both = run_block(self, block, both, modulation, angles, seen, is_picture, None, None, None, length)
    return self.proj_out(self.norm_out(both[:, length:], temb[: len(x)]))


def _angles(rope: Any, length: int, lengths: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, L + T, 1, head size / 2] of the places on three axes: a text's tokens follow each
    other on all of them; its picture stands behind the last of its own `lengths` [B or 1, 1], and around 0 on the
    other two.
    """
    height, width = grid
    pixel = torch.arange(height * width, device=lengths.device)
    row = pixel.div(width, rounding_mode="floor") - (height - height // 2)
    column = pixel % width - (width - width // 2)
    text = torch.arange(length, device=lengths.device).expand(len(lengths), -1)
    found = []
    for size, place in zip(rope.axes_dim, (lengths, row, column), strict=True):
        where = torch.cat([text, place.expand(len(lengths), len(pixel))], dim=1)
        powers = torch.arange(0, size, 2, device=lengths.device, dtype=torch.float32) / size
        found.append(where.unsqueeze(-1) * rope.theta**-powers)
    angles = torch.cat(found, dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


class _Attention:
    """Text attends to the text before it, the picture to all that a mask [B, 1, 1, tokens] of keys tells. Padding
    stands behind its text, so that no text reads it.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None, rotary_emb: tuple[Tensor, Tensor],
        segments: int, **_: Any,
    ) -> Tensor:  # fmt: skip
        """What all tokens attend to, [B, tokens, D]; `segments`: how many of them are text."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(2, (attn.heads, -1))

        values = heads(attn.to_v(hidden_states))
        queries = _rotated(attn.norm_q(heads(attn.to_q(hidden_states))), *rotary_emb).to(values.dtype)
        keys = _rotated(attn.norm_k(heads(attn.to_k(hidden_states))), *rotary_emb).to(values.dtype)
        kernel = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        text, picture = slice(None, segments), slice(segments, None)
        found = torch.cat(
            [
                dispatch_attention_fn(queries[:, text], keys[:, text], values[:, text], is_causal=True, **kernel),
                dispatch_attention_fn(queries[:, picture], keys, values, attn_mask=attention_mask, **kernel),
            ],
            dim=1,
        )
        return attn.to_out[1](attn.to_out[0](found.flatten(2).to(values.dtype)))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Each pair of channels of x [B, tokens, heads, head size] turned by its angle, in fp32."""
    one, other = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cosines - other * sines, one * sines + other * cosines], dim=-1).flatten(-2)
