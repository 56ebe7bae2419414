"""HunyuanVideo-1.5 beside what all families have: quoted texts with an encoder and a mask of their own."""

import json
import shutil
from types import MethodType

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

from flowgrove.errors import UserError
from flowgrove.models.families import family_of
from flowgrove.models.lora_files import how_to_load, layers_of, write_lora
from flowgrove.models.lora_reading import read_lora
from flowgrove.models.policy import Policy
from flowgrove.recipe.schema import Lora
from policy_cases import CPU, encoded, small_recipe
from tiny_families import MODELS

PROMPTS = ["a cat", 'a sign that says "open"', "", "a wall with “one” and “two” on it, " * 3]
NAME = "hunyuan_video15"


def recipe_of(folder, **model):
    return small_recipe(model={**MODELS[NAME], "path": str(folder), "dtype": "fp32", **model})


@torch.no_grad()
def test_quoted_texts_change_the_velocity_as_in_diffusers(folders):
    """Its own forward, told what the pipeline tells it of a video without a first frame, on a mixed batch."""
    policy = Policy.load(recipe_of(folders[NAME]), CPU)
    adapter, rows = policy.adapter, len(PROMPTS)
    prompts = encoded(policy, PROMPTS)
    assert prompts.cond.tensors["source_glyphs_mask"].any(1).tolist() == [False, True, False, True]
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(rows, *adapter.latent_shape, generator=generator), torch.tensor([0.9, 0.7, 0.4, 0.1])
    found = policy.velocity(x, sigma, prompts, torch.arange(rows)).v

    pipe, transformer = adapter.pipe, adapter.transformer
    pipe.tokenizer_max_length = adapter.geometry.prompt_tokens
    embeds, mask, glyphs, glyphs_mask = pipe.encode_prompt(PROMPTS, batch_size=rows)
    transformer.forward = MethodType(HunyuanVideo15Transformer3DModel.forward, transformer)
    for block in transformer.transformer_blocks:
        block.attn.set_processor(HunyuanVideo15AttnProcessor2_0())

    def theirs(glyphs_mask):
        return transformer(
            hidden_states=torch.cat([x, *pipe.prepare_cond_latents_and_mask(x, x.dtype, x.device)], dim=1),
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            encoder_hidden_states_2=glyphs,
            encoder_attention_mask_2=glyphs_mask,
            image_embeds=torch.zeros(rows, 3, transformer.config.image_embed_dim),
            return_dict=False,
        )[0]

    assert (found - theirs(glyphs_mask)).abs().max() <= 1e-5
    changed = (found - theirs(torch.zeros_like(glyphs_mask))).abs().amax((1, 2, 3, 4)) > 1e-3
    assert changed.tolist() == [False, True, False, True]


def test_a_pass_costs_the_video_all_glyphs_and_the_padded_prompt(folders):
    policy = Policy.load(recipe_of(folders[NAME], guidance_scale=1.0), CPU)
    size, prompts = policy.adapter.geometry, encoded(policy, PROMPTS)
    assert size.picture_tokens == 2 * 8 * 8
    assert np.array_equal(prompts.tokens, 2 * 8 * 8 + 256 + -(-prompts.lengths // 16) * 16)
    assert policy.blank_prompt().tokens == [2 * 8 * 8 + 256 + size.prompt_tokens]


def test_a_lora_goes_into_the_transformer_and_is_read_back(folders, tmp_path):
    """diffusers' pipeline loads none."""
    lora, family = Lora(rank=2, alpha=6), family_of(NAME)
    policy = Policy.load(recipe_of(folders[NAME], lora=lora.model_dump()), CPU)
    layers = layers_of({name: torch.randn_like(w) for name, w in policy.weights.trainable().items()}, lora)
    write_lora(tmp_path / "lora", "diffusers", layers, lora, family)
    assert "pipe.transformer.load_lora_adapter(" in how_to_load(tmp_path / "lora", "diffusers", layers, family)
    (file,) = (tmp_path / "lora").iterdir()
    read = read_lora(file, family, [name for name, _ in policy.transformer.named_modules()])
    assert len(read) == len(layers) // 2


def test_models_that_animate_a_picture_are_refused_in_one_line(folders, tmp_path):
    folder = shutil.copytree(folders[NAME], tmp_path / "i2v")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "i2v"}))
    with pytest.raises(UserError, match=r"task_type i2v, and model\.adapter hunyuan_video15 draws from text"):
        Policy.load(recipe_of(folder), CPU)
