"""The family of Chroma: FLUX.1 without its guidance input and pooled text, with prompts marked in attention.

The forward here is diffusers' own with two changes: nothing in it comes from the host, and with checkpoints, too, every
block reads the marks.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.models.comfyui import ATTENTION
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families.flux import Flux
from flowgrove.models.geometry import Geometry
from flowgrove.models.own_forward import replace_forward, run_block


class Chroma(Flux):
    """T5; states are packed latents [tokens, 4·C], each token a patch of 2×2.

    The pipeline gives attention its mask of ones and zeros as numbers, which are added to the scores: padding counts
    for less, but it counts, so that no prompt is shortened to its own length.
    """

    pipeline = "ChromaPipeline"
    published: ClassVar = {"lodestones/Chroma1-HD": "chroma1_hd"}
    guidance_key = None
    comfyui_modules = (
        rf"transformer_blocks\.\d+\.({ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)|x_embedder|context_embedder|proj_out"
    )
    masks_prompts = True
    attends_to_padding = True
    TEXT = ("text_encoder", "tokenizer")

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        replace_forward(transformer, _forward)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """T5 embeddings [P, text tokens, D], and as numbers which of them are the prompt's own, with one behind."""
        longest = self.geometry.prompt_tokens
        embeds, _, marks, *_ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        return Conditioning({"encoder_hidden_states": embeds, "marks": marks})

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the prompts' embeddings, all of them marked."""
        width = self.transformer.config.joint_attention_dim
        embeds = torch.zeros(rows, self.geometry.prompt_tokens, width, dtype=dtype)
        return Conditioning({"encoder_hidden_states": embeds, "marks": torch.ones(embeds.shape[:2], dtype=dtype)})

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, tokens, 4·C] in the transformer's dtype."""
        return self.transformer(x.to(self.dtype), sigma, positions=self._positions(x.device), **cond.tensors)


FAMILY = Chroma


def _forward(
    self: Any, x: Tensor, sigma: Tensor, encoder_hidden_states: Tensor, marks: Tensor, positions: Tensor
) -> Tensor:
    """ChromaTransformer2DModel.forward for packed latents [B, T, C] at σ [B], prompts [B, L, D] with their marks [B, L]
    and the positions [T, 3] of the picture's tokens.
    """
    x, text = self.x_embedder(x), self.context_embedder(encoder_hidden_states)
    modulation = self.distilled_guidance_layer(_modulation_input(self.time_text_embed, sigma.to(x.dtype) * 1000))
    marks = torch.cat([marks, marks.new_ones(x.shape[:2])], dim=1)
    angles = self.pos_embed(torch.cat([positions.new_zeros(text.shape[1], 3), positions]))
    double, single = self.transformer_blocks, self.single_transformer_blocks
    picture_rows, text_rows = modulation[:, 3 * len(single) : -2].chunk(2, dim=1)
    for number, block in enumerate(double):
        rows = slice(6 * number, 6 * number + 6)
        shifts = torch.cat([picture_rows[:, rows], text_rows[:, rows]], dim=1)
        text, x = run_block(self, block, x, text, shifts, angles, marks)
    both = torch.cat([text, x], dim=1)
    for number, block in enumerate(single):
        both = run_block(self, block, both, modulation[:, 3 * number : 3 * number + 3], angles, marks)
    return self.proj_out(self.norm_out(both[:, text.shape[1] :], modulation[:, -2:]))


def _modulation_input(embedding: Any, time: Tensor) -> Tensor:
    """What the layer that makes all blocks' modulation reads: time, no guidance, which of the rows it is, [B, R, C].
    diffusers' forward of `embedding` brings the guidance from the host.
    """
    told = [embedding.time_proj(time), embedding.guidance_proj(torch.zeros_like(time))]
    rows = embedding.mod_proj.to(time).expand(len(time), -1, -1)
    return torch.cat([torch.cat(told, dim=1).to(time.dtype).unsqueeze(1).expand(-1, rows.shape[1], -1), rows], dim=-1)
