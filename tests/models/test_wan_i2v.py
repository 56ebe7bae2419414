"""Wan's image-to-video: what holds of no other family."""

import json
import shutil

import pytest
import torch

from flowgrove.data.prompt import Prompt
from flowgrove.errors import UserError
from flowgrove.models.families import configuration_folder, read_geometry
from flowgrove.models.policy import Policy
from flowgrove.setup import Setup
from pictured import pictured
from policy_cases import CPU, TEXTS, encoded, small_recipe
from tiny_families import MODELS


def published(name, ending="Diffusers", pictures=None, **sections):
    model = {"adapter": "wan_i2v", "path": f"Wan-AI/{name}-{ending}", "source_pictures": pictures}
    return small_recipe(model=model, **sections)


@torch.no_grad()
def test_the_first_frame_goes_to_the_picture_whatever_the_state(folders):
    model = {**MODELS["wan_i2v_5b"], "path": folders["wan_i2v_5b"], "dtype": "fp32", "guidance_scale": 3.0}
    policy = Policy.load(small_recipe(model=model), CPU)
    prompts = encoded(policy)
    x, sigma = torch.randn(3, *policy.adapter.latent_shape), torch.tensor([0.9, 0.5, 0.1])
    found = policy.velocity(x, sigma, prompts, torch.arange(len(TEXTS)))
    source = prompts.cond.tensors["source_latents"]
    for v in (found.v, found.uncond):
        clean = x - sigma.view(-1, 1, 1, 1, 1) * v
        assert (clean[:, :, :1] - source).abs().max() <= 1e-6
        assert (clean[:, :, 1:] - x[:, :, 1:]).abs().max() > 0.01
    other = x.clone()
    other[:, :, 0] += 1  # the model reads the picture in its place
    assert torch.equal(policy.velocity(other, sigma, prompts, torch.arange(3)).v[:, :, 1:], found.v[:, :, 1:])


@pytest.mark.parametrize(
    ("name", "latent", "unit", "fps", "clip"),
    [
        ("Wan2.1-I2V-14B-480P", (16, 21, 60, 104), 16, 16, 257),
        ("Wan2.2-I2V-A14B", (16, 21, 60, 104), 16, 16, 0),
        ("Wan2.2-TI2V-5B", (48, 31, 44, 80), 32, 24, 0),
    ],
)
def test_published_models_have_their_sizes_without_a_download(name, latent, unit, fps, clip):
    model = published(name).model
    size = read_geometry(configuration_folder(model), model)
    assert (size.latent_shape, size.unit, size.fps, size.source_read) == (latent, unit, fps, clip)


def test_the_published_model_of_a_first_and_a_last_picture_reads_both():
    model = published("Wan2.1-FLF2V-14B-720P", "diffusers", 2).model
    size = read_geometry(configuration_folder(model), model)
    assert (size.latent_shape, size.source_read, size.source_pictures) == ((16, 21, 60, 104), 2 * 257, 2)


@torch.no_grad()
def test_the_last_picture_matters_and_its_frame_is_marked(folders):
    """Of the latent frames the first is known whole, of the last one only its last frame."""
    model = {**MODELS["wan_i2v_a14b"], "path": folders["wan_i2v_a14b"], "dtype": "fp32"}
    policy, seen = Policy.load(small_recipe(model=model), CPU), []
    run = policy.adapter.run
    policy.adapter.run = lambda states, *more: seen.append(states) or run(states, *more)
    two = pictured(["a"], 2)
    other = [Prompt("a", (*two[0].pictures[:1], *pictured(["b"], 1)[0].pictures))]
    x, sigma = torch.randn(1, *policy.adapter.latent_shape), torch.tensor([0.95])
    found = [policy.velocity(x, sigma, policy.encode(prompts), torch.tensor([0])).v for prompts in (two, other)]
    assert (found[0] - found[1]).abs().max() > 1e-3
    known = seen[0][0, 4:8]
    assert (known[:, 0] == 1).all()
    assert known[:, -1].amax((1, 2)).tolist() == known[:, -1].amin((1, 2)).tolist() == [0, 0, 0, 1]


def test_the_boundary_of_a14b_is_that_of_image_to_video():
    recipe = published("Wan2.2-I2V-A14B", rollout={"steps": 10, "shift": 5.0})
    experts = [(step.sigma >= 0.9, step.expert) for step in Setup(recipe).first_plan.steps]
    assert set(experts) == {(True, "high"), (False, "low")}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"text_tokens": 9}, "model.text_tokens is 9: .* leave it out"),
        ({"pos_embed_seq_len": 10}, "draws between a first and a last picture: write model.source_pictures: 2"),
        ({"source_pictures": 2}, "model.source_pictures is 2: .* takes a first picture alone: leave it out"),
        ({"source_pictures": 3}, "model.source_pictures is 3: wan_i2v takes 1 to 2"),
        ({"image_encoder": None}, "names no image_encoder: download the whole pipeline folder"),
    ],
)
def test_what_it_does_not_take_is_one_line(folders, tmp_path, change, text):
    folder = shutil.copytree(folders["wan_i2v"], tmp_path / "model")
    model = {**MODELS["wan_i2v"], "path": str(folder), "dtype": "fp32"}
    if change.keys() <= model.keys() | {"source_pictures"}:
        model |= change
    else:
        file = folder / ("model_index.json" if "image_encoder" in change else "transformer/config.json")
        told = {key: [None, None] if value is None else value for key, value in change.items()}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
    with pytest.raises(UserError, match=text):
        Policy.load(small_recipe(model=model), CPU)


@pytest.mark.parametrize(
    ("name", "why"), [("wan_i2v_5b", "nothing would train"), ("wan_i2v_a14b", "nothing lies between")]
)
def test_a_video_that_is_its_pictures_trains_nothing_and_is_refused(folders, name, why):
    model = {**MODELS[name], "path": str(folders[name]), "dtype": "fp32", "frames": 1}
    with pytest.raises(UserError, match=rf"model.frames is 1: .*{why}.*: write 5 or more"):
        Policy.load(small_recipe(model=model), CPU)


def test_a_last_picture_is_refused_where_the_state_holds_the_first(folders):
    model = {**MODELS["wan_i2v_5b"], "path": str(folders["wan_i2v_5b"]), "dtype": "fp32", "source_pictures": 2}
    with pytest.raises(UserError, match="takes a first picture alone: leave it out"):
        Policy.load(small_recipe(model=model), CPU)
