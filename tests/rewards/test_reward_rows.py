"""Rewards that see more than a picture and a text: the prompt's row, its source pictures, and all of its samples."""

import hashlib
import importlib.util
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPImageProcessorPil, CLIPModel

from engine_cases import metrics_of, refuse, succeed, tiny_recipe
from flowgrove.data.prompt import Picture, Prompt
from flowgrove.errors import UserError
from flowgrove.models.sources import fitted
from flowgrove.rewards import scoring
from flowgrove.rewards.faults import Faults
from flowgrove.rewards.ocr import OcrReward, edit_distance, likeness
from pictured import pictured
from planner_cases import user_error
from policy_cases import policy_of, runner_of
from reward_cases import as_pil, clip_folder, pictures, pixels_of, reward_of, rewards_of, serving

SOURCES = pictures(2, 28, 28, seed=9)  # not resized, so the numbers of the processor are ours


def picture_of(pil):
    file = io.BytesIO()
    pil.save(file, "PNG")
    content = file.getvalue()
    return Picture(hashlib.sha256(content).hexdigest(), "a source picture", content=content)


@pytest.fixture(scope="module")
def prompts():
    """Two prompts with rows, of three samples and two."""
    include = [{"class": "cup", "count": 2}]
    one, two = (
        Prompt(f"prompt {number}", (picture_of(pil),), None, {"tag": "count", "include": include, "n": number})
        for number, pil in enumerate(as_pil(SOURCES))
    )
    return [one, one, one, two, two]


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")

    def write(text):
        (tmp_path / "mine.py").write_text(text)
        return str(tmp_path / "mine.py")

    return write


def test_a_function_gets_rows_and_sources_that_it_asks_for(written, prompts):
    path = written(
        "def score(pictures, prompts, metadata, sources):\n"
        "    assert all(type(prompt) is str for prompt in prompts)\n"
        "    return [100 * row['n'] + one.size[0] + (one.mode == 'RGB') for row, (one,) in zip(metadata, sources)]\n"
    )
    scores = rewards_of({"name": "python", "file": path})(pictures(5, 8, 8), prompts)
    assert scores[:, 0].tolist() == [29, 29, 29, 129, 129]


@pytest.mark.parametrize("group", [False, True])
def test_a_function_sees_the_samples_of_one_prompt_together(written, prompts, group):
    path = written("def score(pictures, prompts):\n    return [len(prompts)] * len(prompts)\n")
    scores = rewards_of({"name": "python", "file": path, "group": group})(pictures(5, 8, 8), prompts)
    assert scores[:, 0].tolist() == ([3, 3, 3, 2, 2] if group else [5] * 5)


def test_frames_of_one_time_are_compared(written, prompts):
    path = written("def score(pictures, prompts):\n    return (pictures - pictures.mean(0)).mean((1, 2, 3))\n")
    videos = torch.rand(5, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = rewards_of({"name": "python", "file": path, "group": True})(videos, prompts)[:, 0]
    means = videos.mean((1, 2, 3, 4)).double()
    expected = torch.cat([means[:3] - means[:3].mean(), means[3:] - means[3:].mean()])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("some", [1, 2, 4])
def test_groups_are_scored_whole_however_few_samples_are_decoded_at_a_time(written, prompts, some, monkeypatch):
    path = written("def score(pictures, prompts):\n    return [len(prompts)] * len(prompts)\n")
    rewards = rewards_of({"name": "python", "file": path, "group": True})
    policy = policy_of()
    monkeypatch.setattr(scoring, "PIXELS_AT_ONCE", some * policy.adapter.geometry.pixels)
    leaves = torch.zeros(5, *policy.adapter.latent_shape, dtype=torch.float64)
    scores = scoring.score_leaves(policy, runner_of(policy), rewards, leaves, prompts)
    assert scores[:, 0].tolist() == [3, 3, 3, 2, 2]


def test_groups_of_equal_prompts_are_apart(written):
    path = written("def score(pictures, prompts):\n    return [len(prompts)] * len(prompts)\n")
    rewards = rewards_of({"name": "python", "file": path, "group": True})
    policy = policy_of()
    leaves = torch.zeros(8, *policy.adapter.latent_shape, dtype=torch.float64)
    leaves[5] = torch.nan
    texts, faults = ["one"] * 6 + ["two"] * 2, Faults()
    scores = scoring.score_leaves(policy, runner_of(policy), rewards, leaves, texts, faults, each=2)[:, 0]
    assert scores.isfinite().tolist() == [True] * 4 + [False] * 2 + [True] * 2, "one group of three is left out"
    assert scores[scores.isfinite()].tolist() == [2] * 6


def ranks(handler, content, number):
    """The place of every picture in its request."""
    handler.reply({"scores": list(range(len(content["images"])))})


@pytest.mark.parametrize("group", [False, True])
def test_a_server_gets_rows_sources_and_groups(prompts, group):
    with serving(ranks) as server:
        entry = {"name": "http", "url": server.url, "metadata": True, "sources": True, "group": group, "batch_size": 4}
        scores = rewards_of(entry)(pictures(5, 8, 8), prompts)
    asked = sorted((content for _, _, content in server.asked), key=lambda content: -len(content["prompts"]))
    assert [len(content["prompts"]) for content in asked] == ([3, 2] if group else [4, 1])
    assert scores[:, 0].tolist() == ([0, 1, 2, 0, 1] if group else [0, 1, 2, 3, 0])
    assert [row["n"] for content in asked for row in content["metadata"]] == [0, 0, 0, 1, 1]
    sent = [pixels_of(source) for content in asked for (source,) in content["sources"]]
    as_drawn = [torch.from_numpy(np.array(fitted(pil, 8, 8))) for pil in as_pil(SOURCES)]
    assert all(torch.equal(found, as_drawn[number]) for found, number in zip(sent, [0, 0, 0, 1, 1], strict=True))


def filmed():
    """Two prompts, one with a video of three frames."""
    return [*pictured(["a"], 0, frames=3), Prompt("b", metadata={"n": 1})]


def test_a_function_gets_the_source_videos_that_it_asks_for(written):
    path = written(
        "def score(pictures, prompts, source_videos):\n"
        "    return [0 if video is None else len(video) * video[0].size[0] for video in source_videos]\n"
    )
    assert rewards_of({"name": "python", "file": path})(pictures(2, 8, 8), filmed())[:, 0].tolist() == [3 * 56, 0]


def test_a_server_gets_source_videos_as_large_as_what_is_drawn():
    prompts = filmed()
    with serving(ranks) as server:
        rewards_of({"name": "http", "url": server.url, "sources": True})(pictures(2, 8, 12), prompts)
    content = server.asked[0][2]
    assert content["sources"] == [[], []]
    video, none = content["source_videos"]
    assert none is None
    expected = [np.array(fitted(frame, 8, 12)) for frame in prompts[0].video.load()]
    assert np.array_equal(np.stack([pixels_of(frame).numpy() for frame in video]), np.stack(expected))


def test_a_server_that_is_asked_for_no_more_gets_no_more(prompts):
    with serving(ranks) as server:
        rewards_of({"name": "http", "url": server.url})(pictures(5, 8, 8), prompts)
    assert set(server.asked[0][2]) == {"prompts", "images"}


def test_geneval_sends_the_row_and_refuses_prompts_without_objects(prompts):
    with serving(ranks) as server:
        reward = reward_of(name="geneval", url=server.url)
        reward.check(prompts)
        reward(pictures(5, 8, 8), prompts)
    assert server.asked[0][2]["metadata"][0]["include"] == [{"class": "cup", "count": 2}]
    assert "write data.metadata: [tag, include, exclude]" in user_error(reward.check, ["a cup"])


def test_video_quality_takes_videos_whole(prompts):
    def frames(handler, content, number):
        handler.reply({"scores": [len(video) for video in content["videos"]]})

    with serving(frames) as server:
        scores = rewards_of({"name": "video_quality", "url": server.url})(torch.rand(5, 4, 3, 8, 8), prompts)
    assert scores[:, 0].tolist() == [4] * 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "clip")


def embeddings(folder, pils):
    """By transformers itself."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    with torch.no_grad():
        found = model.get_image_features(**processor(images=pils, return_tensors="pt"))
    return torch.nn.functional.normalize(found if isinstance(found, torch.Tensor) else found.pooler_output, dim=-1)


def test_similarity_is_the_cosine_of_result_and_source(clip, prompts):
    batch = pictures(5, 28, 28)
    scores = rewards_of({"name": "clip_similarity", "path": str(clip)})(batch, prompts)[:, 0]
    own = embeddings(clip, as_pil(SOURCES))[[0, 0, 0, 1, 1]]
    expected = 100 * (embeddings(clip, as_pil(batch)) * own).sum(-1).double()
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert expected.std() > 0.1
    reward = reward_of(name="clip_similarity", path=str(clip))
    reward.check(prompts)
    assert "has 0 source pictures" in user_error(reward.check, ["a cup"])
    assert reward(SOURCES, [prompts[0], prompts[3]]).tolist() == pytest.approx([100, 100], abs=1e-3)


def test_diversity_is_the_distance_to_the_others_of_a_prompt(clip, prompts):
    batch = pictures(5, 28, 28)
    scores = rewards_of({"name": "diversity", "path": str(clip)})(batch, prompts)[:, 0]
    found = embeddings(clip, as_pil(batch)).double()
    for number, score in enumerate(scores.tolist()):
        group = [n for n in range(5) if prompts[n] == prompts[number] and n != number]
        assert score == pytest.approx(100 * (1 - (found[number] @ found[group].T).mean().item()), abs=1e-3)
    same = rewards_of({"name": "diversity", "path": str(clip)})(batch[:1].expand(3, -1, -1, -1), prompts[:3])
    assert same.abs().max() < 1e-3
    reward = reward_of(name="diversity", path=str(clip))
    assert "draw two or more" in user_error(reward, batch[:1], prompts[:1])


@pytest.mark.parametrize(
    ("one", "other", "distance"), [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
)
def test_edit_distance(one, other, distance):
    assert edit_distance(one, other) == edit_distance(other, one) == distance


@pytest.mark.parametrize(
    ("read", "score"), [("HELLO world", 1), ("xx hello  world yy", 1), ("helloworl", 0.9), ("", 0), ("q" * 40, 0)]
)
def test_a_text_is_scored_by_its_edit_distance(read, score):
    assert likeness(read, "Hello World") == pytest.approx(score)


def test_ocr_without_its_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match="pip install rapidocr onnxruntime"):
        OcrReward()


def test_ocr_reads_what_is_written():
    if importlib.util.find_spec("rapidocr") is None:
        pytest.skip("rapidocr is not installed: pip install rapidocr onnxruntime")
    drawn = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(drawn).text((20, 30), "Hello World", fill="red", font=ImageFont.load_default(32))
    picture = torch.from_numpy(np.array(drawn)).movedim(-1, 0).float() / 255
    batch = torch.stack([picture, picture, torch.ones_like(picture)])
    wanted = ['a sign that says "Hello World"', "a sign that says “Hello Wor1d”", 'a sign "Hello World"']
    scores = rewards_of({"name": "ocr"})(batch, wanted)[:, 0]
    assert scores.tolist() == pytest.approx([1, 0.9, 0])
    by_column = reward_of(name="ocr", column="text")
    assert by_column(batch[:1], [Prompt("a sign", metadata={"text": "hello world"})]).tolist() == [1]
    assert "no wanted text in quotes" in user_error(reward_of(name="ocr").check, ["a sign"])
    assert "data.metadata: [text]" in user_error(by_column.check, ["a sign"])


def test_an_evaluation_of_one_picture_has_no_diversity(clip, tmp_path):
    recipe = tiny_recipe(tmp_path, reward=[{"name": "diversity", "path": str(clip)}])
    told = refuse("train", recipe, "--out", tmp_path / "run")
    assert "run.eval.samples is 1: write 2 or more, or run.eval_every: 0" in told


@pytest.mark.long
def test_a_run_trains_on_rows_of_a_file(tmp_path, written):
    path = written(
        "def score(pictures, prompts, metadata):\n"
        "    return [row['gain'] * p.mean().item() for p, row in zip(pictures, metadata)]\n"
    )
    recipe = tiny_recipe(
        tmp_path, reward=[{"name": "python", "file": path, "group": True}],
        data={"prompts": "rows.jsonl", "eval_prompts": None, "metadata": ["gain"]},
        run={"iterations": 1, "eval_every": 0},
    )  # fmt: skip
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "gain": 2}\n{"prompt": "b", "gain": 3}\n', encoding="utf-8")
    succeed("train", recipe, "--out", tmp_path / "run", "--allow-python")
    assert 0 < metrics_of(tmp_path / "run")[0]["reward"]["python"]["mean"] < 3
