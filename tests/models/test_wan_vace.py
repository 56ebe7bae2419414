"""Wan's VACE: what holds of no other family."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrove.data.prompt import Prompt
from flowgrove.data.sources import Picture, Video
from flowgrove.models.families import configuration_folder, read_geometry
from flowgrove.models.policy import Policy
from flowgrove.models.sources import check_sources
from flowgrove.recipe.schema import Model
from pictured import drawn_picture, drawn_video
from planner_cases import user_error
from policy_cases import CPU, small_recipe
from tiny_families import FAMILIES, MODELS

VACE = Model(adapter="wan_vace", path="unused", frames=5)


def policy_at(folders, **model):
    whole = {**MODELS["wan_vace"], "path": folders["wan_vace"], "dtype": "fp32", "lora": None, **model}
    return Policy.load(small_recipe(model=whole), CPU)


def video_of(content, frames=5):
    return Video("video", "video", content=content, frames=frames)


def mask_of(frames=5):
    """A square that wanders, white on black, larger than what is drawn."""
    pictures = []
    for number in range(frames):
        whole = np.zeros((40, 56), np.uint8)
        whole[4 + 4 * number : 24 + 4 * number, 10 : 30 + 4 * number] = 255
        pictures.append(Image.fromarray(whole))
    file = io.BytesIO()
    pictures[0].save(file, "gif", save_all=True, append_images=pictures[1:])
    return video_of(file.getvalue())


def conditioning_of_theirs(folders, prompt, model):
    """What diffusers' pipeline hands its transformer beside the state."""
    pipe = FAMILIES["wan_vace"].pipeline.from_pretrained(folders["wan_vace"])
    pipe.set_progress_bar_config(disable=True)
    seen, forward = [], pipe.transformer.forward

    def seeing(*inputs, control_hidden_states, **named):
        seen.append(control_hidden_states)
        return forward(*inputs, control_hidden_states=control_hidden_states, **named)

    pipe.transformer.forward = seeing
    latents = torch.zeros(1, 4, 2 + (model.source_pictures or 0), model.height // 8, model.width // 8)
    steps = {"num_inference_steps": 1, "output_type": "latent"}
    FAMILIES["wan_vace"].draw(pipe, model, 1.0, [prompt], latents, **steps)
    return seen[0]


@pytest.mark.parametrize(
    ("pictures", "video", "mask"),
    [
        (2, True, True),
        (2, True, False),
        (0, True, True),
        pytest.param(1, False, False, marks=pytest.mark.long),
        pytest.param(0, False, False, marks=pytest.mark.long),
    ],
)
@torch.no_grad()
def test_what_stands_beside_the_state_is_what_the_pipeline_makes(folders, pictures, video, mask):
    """With and without each source; pictures wide and tall, and small ones."""
    size = {"source_pictures": pictures, "height": 16, "width": 48}
    policy, model = policy_at(folders, **size), Model(**{**MODELS["wan_vace"], "path": "unused", **size})
    sizes = [(56, 40), (30, 90)]
    prompt = Prompt(
        "a cup",
        tuple(Picture(str(n), "p", content=drawn_picture("a", n, *sizes[n])) for n in range(pictures)),
        video=video_of(drawn_video("a", 7)) if video else None,
        mask=mask_of() if mask else None,
    )
    found = policy.adapter.encode([prompt]).tensors
    ours = torch.cat([found["source_latents"], found["source_mask"]], dim=1)
    theirs = conditioning_of_theirs(folders, prompt, model)
    assert ours.shape == theirs.shape == (1, 8 + 64, pictures + 2, 2, 6)
    assert (ours - theirs).abs().max() <= 1e-5
    if mask:
        assert 0 < found["source_mask"][:, :, pictures:].float().mean() < 1
    else:
        assert found["source_mask"][:, :, pictures:].all()
    assert not found["source_mask"][:, :, :pictures].any()


@torch.no_grad()
def test_frames_of_reference_pictures_are_not_decoded(folders):
    policy = policy_at(folders, source_pictures=2)
    x = torch.randn(1, *policy.adapter.latent_shape)
    assert x.shape == (1, 4, 4, 4, 4)
    videos = policy.decode(x)
    assert videos.shape == (1, 5, 3, 32, 32)
    x[:, :, :2] = 0
    assert torch.equal(policy.decode(x), videos)


@pytest.mark.parametrize(("pictures", "frames"), [(None, 21), (3, 24)])
@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_published_models_have_their_sizes_without_a_download(name, pictures, frames):
    model = Model(adapter="wan_vace", path=f"Wan-AI/Wan2.1-VACE-{name}-diffusers", source_pictures=pictures)
    size = read_geometry(configuration_folder(model), model)
    assert (size.latent_shape, size.frames, size.fps) == ((16, frames, 60, 104), 81, 16)
    assert size.tokens == frames * 30 * 52


def test_prompts_without_what_the_model_follows_are_named():
    good = Prompt("x", video=video_of(drawn_video("a", 5)))
    check_sources(VACE, [good])
    assert "'y' has no source video, which wan_vace follows: write its path in a column video" in user_error(
        check_sources, VACE, [good, "y"]
    )
    assert "'x' has a mask and no video" in user_error(
        check_sources, VACE.model_copy(update={"source_pictures": 1}),
        [Prompt("x", (Picture("p", "p", content=drawn_picture("a", 0)),), mask=mask_of())],
    )  # fmt: skip
    short = Prompt("x", video=good.video, mask=mask_of(3))
    assert "has 3 frames, and model.frames is 5" in user_error(check_sources, VACE, [short])
    assert "model.sizes" in user_error(check_sources, VACE.model_copy(update={"sizes": [(32, 32)]}), [good])
