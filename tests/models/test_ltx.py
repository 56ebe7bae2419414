"""LTX-Video beside what all families have: decoders that are told a time and add noise, text under a mask that stands
beside no token of the video.
"""

import numpy as np
import pytest
import torch
from diffusers import LTXPipeline

from flowgrove.models.policy import Policy
from policy_cases import CPU, TEXTS, encoded, small_recipe
from tiny_families import FAMILIES, MODELS
from tiny_families.ltx import ltx


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder whose decoder is that of 0.9.1: it is told a time, and its layers add noise."""
    torch.manual_seed(0)
    pipe, folder = ltx(timestep_conditioning=True, decoder_inject_noise=(True,) * 3), tmp_path_factory.mktemp("ltx")
    for name, scale in pipe.vae.decoder.named_parameters():
        if "per_channel_scale" in name:
            torch.nn.init.constant_(scale, 0.5)
    pipe.save_pretrained(folder)
    return folder


def recipe_of(folder, **model):
    return small_recipe(model={**MODELS["ltx"], "path": str(folder), "dtype": "fp32", **model})


@torch.no_grad()
def test_a_decoder_with_noise_decodes_as_the_pipeline_with_its_noise_at_0(noisy, monkeypatch):
    recipe, pipe = recipe_of(noisy), LTXPipeline.from_pretrained(noisy)
    pipe.set_progress_bar_config(disable=True)
    policy = Policy.load(recipe, CPU)
    latents = torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.step = lambda v, t, x, return_dict: (x,)  # so the pipeline decodes what it was given

    def theirs():
        options = FAMILIES["ltx"].options(1.0, TEXTS[:2], recipe.model)
        return pipe(TEXTS[:2], num_inference_steps=2, latents=latents, output_type="pt", **options).frames

    assert (theirs() - theirs()).abs().max() > 1e-3
    decoded = policy.decode(latents)
    assert torch.equal(decoded, policy.decode(latents))
    monkeypatch.setattr(torch, "randn", lambda shape, **options: torch.zeros(shape))
    assert (decoded - theirs()).abs().max() <= 1e-5
    assert decoded.std() > 0.01


def test_text_beside_no_token_costs_a_pass_none(folders):
    policy = Policy.load(recipe_of(folders["ltx"], guidance_scale=3.0), CPU)
    size = policy.adapter.geometry
    assert size.tokens == 2 * 2 * 2
    assert np.array_equal(encoded(policy).tokens, [2 * size.tokens] * len(TEXTS))
    assert policy.blank_prompt().tokens == [2 * size.tokens]
