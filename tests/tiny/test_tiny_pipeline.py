"""The embedded pipeline: small, of real classes, mediocre on purpose."""

import json
import random

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from flowgrove.evaluation import sample
from flowgrove.models.folders import TINY
from flowgrove.rewards.shapes import PASS, ShapesReward
from flowgrove.setup import Setup
from flowgrove.tiny.build import build_pipeline
from flowgrove.tiny.pictures import held_out, pair_scenes, render, single_scenes
from policy_cases import policy_of, runner_of, small_recipe

SINGLE = {"rollout": {"steps": 8, "shift": 1.0}, "run": {"eval": {"samples": 4}}}


def test_it_fits_into_a_package_and_holds_real_classes():
    size = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    assert size <= 5_000_000
    index = json.loads((TINY / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    pipe = policy_of(dtype="fp32").adapter.pipe
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert isinstance(pipe.transformer, SD3Transformer2DModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModelWithProjection)
    assert isinstance(pipe.text_encoder_2, CLIPTextModelWithProjection)
    assert isinstance(pipe.text_encoder_3, T5EncoderModel)
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 1_000_000


def test_the_build_script_makes_pipelines_of_this_shape():
    built = build_pipeline([scene.caption for scene in single_scenes() + pair_scenes()])
    shipped = policy_of(dtype="fp32").adapter.pipe
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        shapes = [
            {name: tuple(p.shape) for name, p in getattr(pipe, part).named_parameters()} for pipe in (built, shipped)
        ]
        assert shapes[0] == shapes[1], part
    sentence = "a red circle left of a blue square"
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        ids = [getattr(pipe, tokenizer)(sentence).input_ids for pipe in (built, shipped)]
        # a token a word, and the ends
        assert len(ids[0]) == len(ids[1]) == 8 + (1 if tokenizer == "tokenizer_3" else 2), tokenizer
        assert len(ids[1]) <= getattr(shipped, tokenizer).model_max_length


@torch.no_grad()
def test_its_vae_keeps_what_the_reward_looks_at():
    scenes = [*single_scenes(), *random.Random(0).sample(pair_scenes(), 60)]
    pictures = render(scenes, random.Random(1))
    vae = policy_of(dtype="fp32").adapter.pipe.vae
    decoded = (vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
    scores = ShapesReward()(decoded, [scene.caption for scene in scenes])
    assert (scores >= PASS).float().mean() >= 0.95
    latents = vae.encode(pictures * 2 - 1).latent_dist.mean
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.2
    assert 0.8 < float(scaled.std()) < 1.2


@torch.no_grad()
def test_it_draws_better_than_chance_and_worse_than_well():
    """Reinforcement learning has something to start from and something to gain."""
    policy, recipe = policy_of(dtype="fp32"), small_recipe(**SINGLE)
    prompts = [scene.caption for scene in single_scenes() if held_out(scene)]
    pictures = sample(Setup(recipe), policy, runner_of(policy), prompts)
    asked = [prompt for prompt in prompts for _ in range(4)]
    score = float(ShapesReward()(pictures, asked).mean())
    assert 0.3 <= score <= 0.7
    shuffled = random.Random(0).sample(asked, len(asked))
    assert float(ShapesReward()(pictures, shuffled).mean()) < score - 0.2, "it does look at its prompt"
