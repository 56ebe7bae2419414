"""clip_score, pickscore and aesthetic against direct use of `transformers` on a tiny random CLIP, and what their
preprocessing does to pictures.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from flowgrove.rewards.preprocess import read_preprocess
from host_reads import DEVICE, HostWaits
from planner_cases import user_error
from reward_cases import MEAN, PROMPTS, STD, as_pil, clip_folder, pictures, reward_of, rewards_of, same_on_a_gpu

SIZES = [(28, 28), (64, 64), (97, 41), (41, 97), (33, 34), (20, 17), (28, 61)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "other", seed=7)


def direct(folder, pixels, prompts):
    """Unit embeddings by the library alone, one picture and one prompt at a time, and the model."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        seen = torch.cat([model.get_image_features(pixel_values=row[None]).pooler_output for row in pixels])
        words = [tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt") for prompt in prompts]
        read = torch.cat([model.get_text_features(**row).pooler_output for row in words])
    return seen / seen.norm(dim=-1, keepdim=True), read / read.norm(dim=-1, keepdim=True), model


def as_the_library_reads(folder, batch):
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    return processor(as_pil(batch), return_tensors="pt").pixel_values


# Preprocessing


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_the_librarys_processor_does(folder, size):
    """Within the 8-bit rounding of PIL's two passes:
    one and a half grey levels at the most, a third of one on average.
    """
    batch = pictures(3, *size)
    ours, theirs = read_preprocess(folder, "clip_score")(batch), as_the_library_reads(folder, batch)
    assert ours.shape == theirs.shape == (3, 3, 28, 28)
    levels = (ours - theirs).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
    assert levels.max() < 1.5
    assert levels.mean() < (1e-3 if size == (28, 28) else 0.34)


def test_noise_is_prepared_alike_too(folder):
    """Where a filter without antialiasing, or with other weights, would be far off."""
    batch = (torch.rand(2, 3, 90, 60, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    ours, theirs = read_preprocess(folder, "clip_score")(batch), as_the_library_reads(folder, batch)
    levels = (ours - theirs).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255
    assert levels.max() < 2
    aliased = torch.nn.functional.interpolate(batch, (42, 28), mode="bicubic")[:, :, 7:35]
    assert (
        aliased - (ours * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1))
    ).abs().max() * 255 > 50


@pytest.mark.parametrize("size", [(40, 40), (51, 30)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"shortest_edge": 20}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"height": 30, "width": 35}, "crop_size": {"height": 28, "width": 28}},
        {"size": {"height": 28, "width": 28}, "do_center_crop": False},
        {"size": {"shortest_edge": 28}, "resample": 2},
    ],
    ids=["cut", "filled", "stretched", "uncut", "bilinear"],
)
def test_other_settings_of_a_processor_are_followed(tmp_path, settings, size):
    CLIPImageProcessorPil(
        **{"crop_size": {"height": 28, "width": 28}, "image_mean": MEAN, "image_std": STD, **settings}
    ).save_pretrained(tmp_path)
    batch = pictures(2, *size)
    ours, theirs = read_preprocess(tmp_path, "clip_score")(batch), as_the_library_reads(tmp_path, batch)
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs() * torch.tensor(STD).view(1, 3, 1, 1) * 255).max() < 2


def test_settings_are_found_where_older_and_newer_releases_write_them(folder, tmp_path):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": 28, "crop_size": 28}  # as OpenAI's own file has them
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert read_preprocess(tmp_path, "clip_score") == read_preprocess(folder, "clip_score")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": settings, "processor_class": "CLIPProcessor"})
    )
    assert read_preprocess(tmp_path, "clip_score") == read_preprocess(folder, "clip_score")


# Scores


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_clip_score_is_a_hundred_times_the_cosine(folder, batch_size):
    batch = pictures(5, 28, 28)  # not resized, so the processor's numbers are ours
    seen, read, _ = direct(folder, as_the_library_reads(folder, batch), PROMPTS)
    scores = reward_of(name="clip_score", path=str(folder), batch_size=batch_size)(batch, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, 100 * (seen * read).sum(-1), atol=2e-4, rtol=0)
    assert scores.std() > 1


def test_pickscore_scales_the_cosine_by_the_trained_scale(folder, other):
    batch = pictures(5, 28, 28)
    seen, read, model = direct(other, as_the_library_reads(folder, batch), PROMPTS)
    scores = reward_of(name="pickscore", path=str(other), processor=str(folder))(batch, PROMPTS)
    torch.testing.assert_close(
        scores, model.logit_scale.exp().detach() * (seen * read).sum(-1) / 100, atol=1e-6, rtol=1e-5
    )
    assert not torch.isclose(model.logit_scale.detach(), torch.tensor(0.0), atol=0.05)  # a scale that shows


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_is_a_stack_of_linear_layers_on_the_unit_embedding(folder, tmp_path, suffix):
    torch.manual_seed(3)
    layers = torch.nn.Sequential(
        torch.nn.Linear(20, 16),
        torch.nn.Dropout(),
        torch.nn.Linear(16, 8),
        torch.nn.Dropout(),
        torch.nn.Linear(8, 4),
        torch.nn.Linear(4, 1),
    ).eval()
    state = {f"layers.{name}": value for name, value in layers.state_dict().items()}
    file = tmp_path / f"sac+logos+ava1-l14-linearMSE.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    batch = pictures(5, 28, 28)
    seen, _, _ = direct(folder, as_the_library_reads(folder, batch), PROMPTS)
    for path in (file, tmp_path):  # the file, or the folder that holds it
        scores = reward_of(name="aesthetic", path=str(path), clip=str(folder), batch_size=3)(batch, PROMPTS)
        torch.testing.assert_close(scores, layers(seen).squeeze(-1).detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (97, 41)])
def test_resized_pictures_score_as_through_the_librarys_processor(folder, size):
    """The 8-bit rounding of the processor is all that differs: a tenth of what two pictures differ by at most."""
    batch = pictures(5, *size)
    seen, read, _ = direct(folder, as_the_library_reads(folder, batch), PROMPTS)
    scores = reward_of(name="clip_score", path=str(folder))(batch, PROMPTS)
    wanted = 100 * (seen * read).sum(-1)
    assert (scores - wanted).abs().max() < 0.1 * wanted.std()


def test_the_text_tower_runs_once_per_distinct_prompt(folder):
    scorer = reward_of(name="clip_score", path=str(folder), batch_size=2)
    rows = []
    scorer.clip.model.text_model.register_forward_hook(
        lambda module, arguments, output: rows.append(len(output.last_hidden_state))
    )
    scorer(pictures(5, 28, 28), PROMPTS)
    assert sum(rows) == len(set(PROMPTS)) == 3
    assert max(rows) <= 2


def test_pictures_go_through_in_batches(folder):
    scorer = reward_of(name="clip_score", path=str(folder), batch_size=4)
    rows = []
    scorer.clip.model.vision_model.register_forward_hook(
        lambda module, arguments, output: rows.append(len(output.last_hidden_state))
    )
    scorer(pictures(9, 28, 28), ["a"] * 9)
    assert rows == [4, 4, 1]


def test_a_prompt_longer_than_the_tower_is_cut_not_refused(folder):
    scorer = reward_of(name="clip_score", path=str(folder))
    scores = scorer(pictures(1, 28, 28).repeat(3, 1, 1, 1), ["abcdefghij " * 20, "abcdefghij", "abcdefghi"])
    assert scores[0] == scores[1]
    assert scores[1] != scores[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pictures_of_any_dtype_are_scored_in_fp32(folder, dtype):
    batch = pictures(3, 30, 40).to(dtype)
    scorer = reward_of(name="clip_score", path=str(folder))
    assert torch.equal(scorer(batch, PROMPTS[:3]), scorer(batch.float(), PROMPTS[:3]))


def test_bf16_weights_score_about_the_same(folder):
    batch = pictures(5, 28, 28)
    exact = reward_of(name="clip_score", path=str(folder))(batch, PROMPTS)
    coarse = reward_of(name="clip_score", path=str(folder), dtype="bf16")(batch, PROMPTS)
    assert coarse.dtype == torch.float32
    assert 0 < (coarse - exact).abs().max() < 3


def test_nothing_can_be_trained_by_mistake(folder):
    scorer = reward_of(name="clip_score", path=str(folder))
    assert not any(value.requires_grad for value in scorer.clip.model.parameters())
    assert not scorer.clip.model.training


# Weights that are not there, or wrong

MISSING = [
    ("clip_score", "path", "openai/clip-vit-large-patch14"),
    ("pickscore", "path", "yuvalkirstain/PickScore_v1"),
    ("hpsv2", "path", "xswu/HPSv2"),
    ("aesthetic", "path", "camenduru/improved-aesthetic-predictor"),
    ("image_reward", "path", "zai-org/ImageReward"),
]


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(("name", "option", "repository"), MISSING)
def test_absent_weights_are_one_line_with_the_command_that_fetches_them(name, option, repository, tmp_path):
    text = user_error(rewards_of, {"name": name})
    assert all(part in text for part in (name, f"hf download {repository}", option))
    text = user_error(rewards_of, {"name": name, "path": str(tmp_path / "nowhere")})
    assert f"hf download {repository}" in text
    assert f"--local-dir {tmp_path / 'nowhere'}" in text
    (tmp_path / "there").mkdir()
    text = user_error(rewards_of, {"name": name, "path": str(tmp_path / "there")})
    assert f"hf download {repository}" in text
    assert f"--local-dir {tmp_path / 'there'}" in text


@pytest.mark.usefixtures("empty_cache")
def test_absent_processors_are_one_line_too(folder):
    text = user_error(rewards_of, {"name": "pickscore", "path": str(folder)})
    assert all(part in text for part in ("processor", "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    text = user_error(rewards_of, {"name": "pickscore", "path": str(folder), "processor": "someone/else"})
    assert "hf download someone/else" in text


def test_a_repository_in_the_hub_cache_is_found(folder, monkeypatch, tmp_path):
    """As `hf download` lays it out."""
    repository = tmp_path / "models--openai--clip-vit-large-patch14"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("a" * 40)).symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    scores = reward_of(name="clip_score")(pictures(2, 28, 28), PROMPTS[:2])
    assert torch.equal(scores, reward_of(name="clip_score", path=str(folder))(pictures(2, 28, 28), PROMPTS[:2]))


def test_weights_that_lack_a_tensor_are_refused_where_the_library_would_draw_it(tmp_path):
    folder = clip_folder(tmp_path / "lacking")
    state = load_file(folder / "model.safetensors")
    del state["vision_model.post_layernorm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    text = user_error(rewards_of, {"name": "clip_score", "path": str(folder)})
    assert all(part in text for part in ("clip_score", str(folder), "post_layernorm"))


def test_a_configuration_without_an_end_is_one_line(tmp_path):
    folder = clip_folder(tmp_path / "endless")
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"]["num_hidden_layers"] = 2**40
    (folder / "config.json").write_text(json.dumps(settings))
    text = user_error(rewards_of, {"name": "clip_score", "path": str(folder)})
    assert "says num_hidden_layers 1099511627776, which no model has" in text


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"[]", b'{"size": 28}'])
def test_broken_files_are_one_line(tmp_path, file, content):
    folder = clip_folder(tmp_path / "broken")
    (folder / file).write_bytes(content)
    text = user_error(rewards_of, {"name": "clip_score", "path": str(folder)})
    assert "clip_score" in text
    assert str(folder) in text


HEADS = {
    "of another width": {"layers.0.weight": torch.zeros(1, 21), "layers.0.bias": torch.zeros(1)},
    "with two outputs": {"layers.0.weight": torch.zeros(2, 20), "layers.0.bias": torch.zeros(2)},
    "without a bias": {"layers.0.weight": torch.zeros(1, 20)},
    "of something else": {"weight": torch.zeros(1, 20)},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_predictor_that_does_not_fit_is_refused(folder, tmp_path, head):
    save_file(HEADS[head], tmp_path / "head.safetensors")
    text = user_error(
        rewards_of, {"name": "aesthetic", "path": str(tmp_path / "head.safetensors"), "clip": str(folder)}
    )
    assert str(tmp_path / "head.safetensors") in text


def test_a_weights_file_that_would_run_code_is_refused(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"layers.0.weight": Trap()}, tmp_path / "head.pth")
    assert str(tmp_path / "head.pth") in user_error(
        rewards_of, {"name": "aesthetic", "path": str(tmp_path / "head.pth"), "clip": str(folder)}
    )
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
@torch.no_grad()
def test_nothing_is_copied_from_pageable_memory(folder, name, where):
    """Which the thread that scores would wait for, beside the rollout."""
    processor = {"processor": str(folder)} if name == "pickscore" else {}
    entry = {"name": name, "path": str(folder), "batch_size": 2, **processor}
    (scorer,) = rewards_of(entry, device=DEVICE).scorers.values()
    batch = pictures(5, 40, 60).to(where)
    with HostWaits() as waits:
        scores = scorer(batch, PROMPTS)
    assert [line for line in waits.noted if not line.startswith("reads")] == []
    assert (scores.device, scores.shape) == (DEVICE, (5,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_gives_the_same_scores(folder):
    same_on_a_gpu(1e-2, name="clip_score", path=str(folder))
