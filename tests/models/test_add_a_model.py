"""The guide engine/flowgrove/models/README.md:
its AuraFlow example, taken from the page, against diffusers' own pipeline.
"""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from flowgrove.models import geometry, loading
from flowgrove.models.folders import TINY
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.rollout.loop import rollout
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, TEXTS, encoded, runner_of, small_recipe
from tiny_pipelines import autoencoder, lively, t5_config

GUIDE = Path(loading.__file__).with_name("README.md")


def code_with(mark):
    """The Python block of the page that holds `mark`."""
    return next(
        block
        for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
        if mark in block
    )


@pytest.fixture
def auraflow(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer_3")
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)), vae=autoencoder(),
        transformer=lively(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(tmp_path)  # fmt: skip
    space = dict(vars(geometry))
    exec(code_with("def _auraflow"), space)
    exec(code_with("class AuraFlow"), space)
    monkeypatch.setitem(geometry._FAMILIES, "auraflow", ("AuraFlowPipeline", space["_auraflow"]))
    monkeypatch.setitem(loading.ADAPTERS, "auraflow", space["AuraFlow"])
    recipe = small_recipe(
        model={
            "adapter": "sd3",
            "path": str(tmp_path),
            "dtype": "fp32",
            "guidance_scale": 3.5,
            "height": 16,
            "width": 32,
            "text_tokens": 9,
        },
        rollout={
            "steps": 4,
            "shift": None,
            "group_size": 2,
            "shared_initial_noise": False,
            "window": {"strategy": "none"},
        },
    )
    # as recipe.py would take it
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": "auraflow"})})


@torch.no_grad()
def test_the_example_draws_what_the_diffusers_pipeline_draws(auraflow):
    policy = Policy.load(auraflow, CPU)
    plan = make_plan(auraflow, 0, recipe_sigmas(auraflow))
    forest = rollout(plan, plan_coefficients(plan), policy, encoded(policy), runner_of(policy), seed=3, iteration=9)
    pipe = AuraFlowPipeline.from_pretrained(auraflow.model.path)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.arange(len(TEXTS)).repeat_interleave(2)
    noise = philox_normal(
        (len(prompt), *policy.adapter.latent_shape),
        NoiseKey(3, 9, INITIAL_STEP, prompt, torch.arange(2).repeat(len(TEXTS))),
    )
    options = {"height": 16, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 9}
    texts = [text for text in TEXTS for _ in range(2)]
    expected = pipe(texts, latents=noise, output_type="latent", **options)
    assert (forest.leaves - expected.images).abs().max() <= 1e-4
    assert (forest.leaves[0] - forest.leaves[2]).abs().max() > 0.01
    pictures = pipe.image_processor.postprocess(
        pipe.vae.decode(expected.images / pipe.vae.config.scaling_factor).sample, output_type="pt"
    )
    assert (policy.decode(forest.leaves) - pictures).abs().max() <= 1e-4
