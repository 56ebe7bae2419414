"""hpsv2 against OpenCLIP itself (tests/fixtures/make_open_clip.py):
names, shapes, heads, where a text ends, and that the whole picture is seen.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate, normalize, pad
from transformers import CLIPModel, CLIPTokenizer

from flowgrove.rewards.clip import load_strictly
from flowgrove.rewards.open_clip import clip_config, renamed
from flowgrove.rewards.preprocess import fit
from planner_cases import user_error
from reward_cases import MEAN, STD, pictures, reward_of, rewards_of, same_on_a_gpu

FIXTURE = Path(__file__).parents[1] / "fixtures" / "open_clip.safetensors"
EOT = 63


@pytest.fixture(scope="module")
def known():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def weights(known):
    return {name.removeprefix("weights."): value for name, value in known.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def model(weights):
    state = renamed(weights)
    return load_strictly(
        "hpsv2", FIXTURE, CLIPModel, None, config=clip_config(state, 3, 2, EOT), state_dict=state
    ).eval()


@pytest.fixture
def folder(tmp_path, weights):
    """The weights as HPSv2 publishes them, and a processor whose tokens are letters."""
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [
        "!",
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *"0123456",
        "unused",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    words = [*words[: EOT - 1], "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=12
    ).save_pretrained(tmp_path)
    settings = {
        "size": 28,
        "crop_size": 28,
        "do_center_crop": True,
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"num_attention_heads": 3}, "vision_config": {"num_attention_heads": 2}})
    )
    return tmp_path


@torch.no_grad()
def test_pictures_are_embedded_as_open_clip_does(model, known):
    ours = model.get_image_features(pixel_values=known["pictures"]).pooler_output
    torch.testing.assert_close(ours, known["picture_embeddings"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalize(ours, dim=-1), known["unit_picture_embeddings"], atol=1e-6, rtol=1e-5)
    assert (known["picture_embeddings"][0] - known["picture_embeddings"][1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("filler", [0, EOT])
@pytest.mark.parametrize("masked", [False, True])
def test_texts_are_embedded_as_open_clip_does_whatever_fills_them_up(model, known, filler, masked):
    """OpenCLIP fills up with 0 and reads at the highest token,
    `transformers` fills up with the end token and reads at the first of those.
    """
    texts, mask = known["texts"].clone(), torch.ones_like(known["texts"])
    for row, text in enumerate(known["texts"]):
        end = int(text.argmax())
        texts[row, end + 1 :], mask[row, end + 1 :] = filler, 0
    ours = model.get_text_features(input_ids=texts, attention_mask=mask if masked else None).pooler_output
    torch.testing.assert_close(ours, known["text_embeddings"], atol=1e-5, rtol=1e-5)


def test_every_tensor_is_used(model, weights):
    """Each of OpenCLIP's 74 tensors, as many numbers on both sides."""
    state = renamed(weights)
    assert set(state) == set(model.state_dict())
    assert sum(value.numel() for value in state.values()) == sum(value.numel() for value in weights.values())


@torch.no_grad()
def test_the_score_is_the_cosine(folder, model):
    batch, prompts = pictures(4, 28, 28), ["a cat", "dogs", "a cat", ""]
    scores = reward_of(name="hpsv2", path=str(folder), processor=str(folder), batch_size=3)(batch, prompts)
    seen = model.get_image_features(
        pixel_values=(batch - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    ).pooler_output
    letter = {"a": 27, "c": 3, "t": 46, "d": 4, "o": 15, "g": 7, "s": 45, "inner a": 1}
    spelt = {
        "a cat": [letter["a"], letter["c"], letter["inner a"], letter["t"]],
        "dogs": [letter["d"], letter["o"], letter["g"], letter["s"]],
        "": [],
    }
    texts = torch.zeros(4, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        texts[row, : len(spelt[prompt]) + 2] = torch.tensor([EOT - 1, *spelt[prompt], EOT])
    read = model.get_text_features(input_ids=texts).pooler_output
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.cosine_similarity(seen, read), atol=1e-5, rtol=1e-5)
    assert scores[0] != scores[2]


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (20, 10), (28, 28), (29, 100)])
def test_the_whole_picture_is_fitted_into_a_black_square(size):
    """An independent computation: resize by the larger side, then stand it in the middle."""
    batch = pictures(2, *size)
    fitted = fit(batch, 28)
    scale = 28 / max(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    small = (
        batch
        if (height, width) == size
        else interpolate(batch, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    )
    top, left = (28 - height) // 2, (28 - width) // 2
    torch.testing.assert_close(fitted, pad(small, (left, 28 - width - left, top, 28 - height - top)))
    assert fitted.shape == (2, 3, 28, 28)


def test_what_a_crop_would_lose_counts(folder):
    scorer = reward_of(name="hpsv2", path=str(folder), processor=str(folder))
    batch = pictures(1, 28, 84).repeat(2, 1, 1, 1)
    batch[1, :, :, :20] = 0.9
    scores = scorer(batch, ["a cat"] * 2)
    assert (scores[0] - scores[1]).abs() > 1e-3


def test_the_file_itself_will_do_and_half_precision_too(folder, weights, tmp_path):
    scores = reward_of(name="hpsv2", path=str(folder), processor=str(folder))(pictures(2, 40, 30), ["a", "b"])
    torch.save({"state_dict": {name: value.half() for name, value in weights.items()}}, tmp_path / "half.pt")
    half = reward_of(name="hpsv2", path=str(tmp_path / "half.pt"), processor=str(folder))(
        pictures(2, 40, 30), ["a", "b"]
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, scores, atol=0.02, rtol=0)


def test_the_heads_are_those_of_vit_h_unless_a_config_says_otherwise(folder):
    """16 heads do not divide this tower's 24: an error of one line, not another model."""
    (folder / "config.json").unlink()
    assert str(folder / "HPS_v2.1_compressed.pt") in user_error(
        rewards_of, {"name": "hpsv2", "path": str(folder), "processor": str(folder)}
    )


@pytest.mark.parametrize(
    "lost",
    ["visual.proj", "visual.transformer.resblocks.1.attn.in_proj_bias", "ln_final.weight", "positional_embedding"],
)
def test_a_file_that_lacks_a_tensor_is_refused(folder, weights, lost):
    torch.save(
        {"state_dict": {name: value for name, value in weights.items() if name != lost}},
        folder / "HPS_v2.1_compressed.pt",
    )
    text = user_error(rewards_of, {"name": "hpsv2", "path": str(folder), "processor": str(folder)})
    assert str(folder / "HPS_v2.1_compressed.pt") in text


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"epoch": 3}, [1, 2], {"state_dict": {"a": torch.zeros(2)}}])
def test_a_file_of_something_else_is_refused(folder, content):
    torch.save(content, folder / "HPS_v2.1_compressed.pt")
    text = user_error(rewards_of, {"name": "hpsv2", "path": str(folder), "processor": str(folder)})
    assert str(folder / "HPS_v2.1_compressed.pt") in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_gives_the_same_scores(folder):
    same_on_a_gpu(1e-4, name="hpsv2", path=str(folder), processor=str(folder))
