"""The family of Z-Image and Z-Image-Turbo: one stream of picture and text, and prompts of any length under a mask.

diffusers' forward takes a list of prompts and works on each in turn, with lengths that the host must know. Here the
same transformer runs on padded batches, by a forward that asks nothing of the host.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter, scaled_and_decoded
from flowgrove.models.conditioning import Conditioning, blank_texts
from flowgrove.models.geometry import Geometry, autoencoder_scale, drawn_size, part_config
from flowgrove.models.own_forward import replace_forward, run_block
from flowgrove.recipe.schema import Model

PATCH = 2  # latents per token and side
STEP = 32  # pictures and prompts are filled up to a multiple of so many tokens, which take part in attention


class ZImage(Adapter):
    """Qwen3 as the text encoder; states are latents [C, h, w]. What the pipeline calls guidance_scale is γ − 1."""

    pipeline = "ZImagePipeline"
    published: ClassVar = {"Tongyi-MAI/Z-Image-Turbo": "z_image_turbo"}
    gives_table = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    comfyui_modules = (
        r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
        r"|(layers|noise_refiner)\.\d+\.adaLN_modulation\.0|cap_embedder\.1|t_embedder\.mlp\.[02]"
        r"|all_x_embedder\.2-1|all_final_layer\.2-1\.(linear|adaLN_modulation\.1)"
    )
    masks_prompts = True
    TEXT = ("text_encoder", "tokenizer")
    LATENTS = ("scaling_factor", "shift_factor")

    def __init__(self, geometry: Geometry, transformer: Any, pipe: Any = None, folder: Path | None = None) -> None:
        super().__init__(geometry, transformer, pipe, folder)
        replace_forward(transformer, _forward)

    @classmethod
    def read_geometry(cls, folder: Path, model: Model) -> Geometry:
        """From the transformer's and the VAE's configuration; the scheduler counts picture tokens before they are
        filled up.
        """
        scale = autoencoder_scale(folder)
        unit, text, transformer = PATCH * scale, model.text_tokens or 512, part_config(folder, "transformer")
        places, *sides = transformer.get("axes_lens", (1536, 512, 512))  # of the tables of rotations
        if text + STEP >= places:
            raise UserError(f"model.text_tokens is {text}: the model reads {places - STEP - 1} at most")
        height, width = drawn_size(model, 1024, unit, min(sides) * unit)
        latent = (transformer["in_channels"], height // scale, width // scale)
        return Geometry(latent, height, width, unit, None, (height // unit) * (width // unit), text, text)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings [P, longest prompt, D] and their mask."""
        longest = self.geometry.prompt_tokens
        rows, _ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=longest)
        mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        return Conditioning(
            {
                "encoder_hidden_states": pad_sequence(rows, batch_first=True),
                "encoder_hidden_states_mask": pad_sequence(mask, batch_first=True),
            }
        )

    def blank(self, rows: int, dtype: torch.dtype) -> Conditioning:
        """Zeros in the shape of the longest prompts' embeddings, nothing masked."""
        width = self.transformer.config.cap_feat_dim
        return Conditioning(blank_texts(rows, self.geometry.prompt_tokens, width, dtype))

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float) -> Tensor:
        """v [B, C, h, w] in the transformer's dtype; its time runs from 0 to 1, and it predicts −v."""
        return -self.transformer(x.to(self.dtype), 1 - sigma, **cond.tensors)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1]."""
        vae = self.pipe.vae
        return scaled_and_decoded(vae, x.to(vae.dtype), x.dtype)


FAMILY = ZImage


def _forward(
    self: Any,
    x: Tensor,
    time: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None = None,
) -> Tensor:
    """ZImageTransformer2DModel.forward for latents [B, C, h, w] at `time` [B] and prompts [B, L, D] whose mask [B, L]
    marks their tokens, which stand first; None: all.
    """
    size = f"{PATCH}-1"
    _, channels, height, width = x.shape
    temb = self.t_embedder(time * self.t_scale).type_as(x)

    prompts = _filled_up(encoder_hidden_states)
    place = torch.arange(prompts.shape[1], device=x.device)
    seen: Tensor | None = None
    if encoder_hidden_states_mask is None:
        lengths = place.new_full((len(x), 1), encoder_hidden_states.shape[1])
        filled = torch.full_like(lengths, prompts.shape[1])
    else:
        lengths = encoder_hidden_states_mask.sum(1, keepdim=True)
        filled = (lengths + STEP - 1).div(STEP, rounding_mode="floor") * STEP  # [B, 1]
        seen = place < filled
    prompts = torch.where((place < lengths).unsqueeze(-1), self.cap_embedder(prompts), self.cap_pad_token)
    prompt_angles = _angles(self, place + 1, torch.zeros_like(place), torch.zeros_like(place)).unsqueeze(0)
    for block in self.context_refiner:
        prompts = run_block(self, block, prompts, seen, prompt_angles)

    tokens = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    real = tokens.shape[1]
    tokens = _filled_up(tokens)
    pixel = torch.arange(tokens.shape[1], device=x.device)
    is_real, columns = pixel < real, width // PATCH
    row, column = (torch.where(is_real, of, 0) for of in (pixel // columns, pixel % columns))
    pictures = torch.where(is_real.unsqueeze(-1), self.all_x_embedder[size](tokens), self.x_pad_token)
    # a picture stands after its prompt on the first axis
    where = torch.where(is_real, filled + 1, 0)
    angles = _angles(self, where, row.expand_as(where), column.expand_as(where))
    for block in self.noise_refiner:
        pictures = run_block(self, block, pictures, None, angles, temb)

    both = torch.cat([pictures, prompts], dim=1)
    seen = None if seen is None else torch.cat([seen.new_ones(pictures.shape[:2]), seen], dim=1)
    angles = torch.cat([angles, prompt_angles.expand(len(x), -1, -1)], dim=1)
    for block in self.layers:
        both = run_block(self, block, both, seen, angles, temb)
    found = self.all_final_layer[size](both[:, :real], c=temb)
    found = found.view(len(x), height // PATCH, columns, PATCH, PATCH, channels)
    return found.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def _filled_up(tokens: Tensor) -> Tensor:
    """With zeros behind, up to a multiple of STEP tokens."""
    return pad(tokens, (0, 0, 0, -tokens.shape[1] % STEP))


def _angles(self: Any, *places: Tensor) -> Tensor:
    """The rotations of tokens at these places on each axis, all of one shape: [*shape, head size / 2]."""
    ids = torch.stack(places, dim=-1)
    return self.rope_embedder(ids.flatten(0, -2)).unflatten(0, ids.shape[:-1])
