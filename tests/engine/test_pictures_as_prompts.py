"""A run whose prompts carry pictures: what it draws beside them, and what it says of bad ones."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from engine_cases import metrics_of, refuse, succeed
from flowgrove.data.sources import Picture, Video
from flowgrove.models.loading import check_prompts
from flowgrove.models.policy import Policy
from flowgrove.models.sources import fitted
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.grids import load_grid
from flowgrove.setup import Setup
from model_recipes import write_recipe
from pictured import drawn_picture, write_prompts
from planner_cases import user_error
from policy_cases import CPU

TEXTS = ["make it red", "make it blue"]


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    recipe = write_recipe(folder, "flux_kontext", folders["flux_kontext"], "mix", lora={"rank": 4, "alpha": 8})
    write_prompts(folder / "eval", TEXTS, 1)
    settings = ("run.eval_every=2", "run.eval.samples=2", "run.iterations=2")
    succeed("train", recipe, "--out", folder / "run", *(part for one in settings for part in ("--set", one)))
    return folder / "run"


def sources(height=32, width=32):
    pictures = [Image.open(io.BytesIO(drawn_picture(text, 0))).convert("RGB") for text in TEXTS]
    return np.stack([np.asarray(fitted(one, height, width)) for one in pictures])


def test_grids_show_the_source_before_its_samples(run):
    grid = load_grid(run / "samples" / "iteration_000002.png")
    assert grid.tiles.shape == (2, 2, 32, 32, 3)
    assert grid.prompts == TEXTS
    assert np.array_equal(grid.sources[:, 0], sources())
    with Image.open(run / "samples" / "iteration_000002.png") as whole:
        assert whole.size == (3 * 32, 2 * 32)


def test_samples_lie_beside_their_sources(run, tmp_path):
    prompts = write_prompts(tmp_path / "new", TEXTS, 1)
    succeed("sample", run, "--prompts", prompts, "--out", tmp_path / "out", "--compare")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    drawn = {f"{n:04d}_{k}{kind}.png" for n in range(2) for k in range(2) for kind in ("", "_base")}
    assert names == drawn | {
        "0000_source_0.png",
        "0001_source_0.png",
        "prompts.jsonl",
        "prompts_base.jsonl",
        "compare_00.png",
    }
    for number, expected in enumerate(sources()):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{number:04d}_source_0.png")), expected)


def test_what_is_drawn_depends_on_the_picture(run, tmp_path):
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        prompts = write_prompts(tmp_path / name / "p", TEXTS[:1], 1)
        (tmp_path / name / "p_0_0.png").write_bytes(drawn_picture("a picture", number))
        succeed("sample", run, "--prompts", prompts, "--out", tmp_path / name / "out")
    one, other = (np.asarray(Image.open(tmp_path / n / "out" / "0000_0.png")).astype(int) for n in ("one", "other"))
    assert (one != other).mean() > 0.05


def test_evaluation_of_the_run_reads_its_pictures_again(run):
    while_it_trained = metrics_of(run)[-1]["eval_rewards"]["jpeg_size"]["mean"]
    succeed("eval", run)
    assert json.loads((run / "eval.json").read_text())["jpeg_size"]["mean"] == pytest.approx(while_it_trained, rel=1e-6)


@pytest.mark.parametrize(
    ("content", "told"), [(None, "which cannot be read"), (b"no picture", "is no picture that can be read")]
)
def test_a_bad_picture_ends_a_run_before_its_model_loads(folders, tmp_path, monkeypatch, content, told):
    recipe = write_recipe(tmp_path, "flux_kontext", folders["flux_kontext"], "mix")
    bad = tmp_path / "train_1_0.png"
    bad.unlink() if content is None else bad.write_bytes(content)
    monkeypatch.setattr(Policy, "load_together", lambda *_, **__: pytest.fail("a model was loaded"))
    said = refuse("train", recipe, "--out", tmp_path / "run")
    assert "train_1_0.png" in said
    assert told in said


@pytest.mark.parametrize(
    ("name", "sources", "first"), [("flux_kontext", 1, "train_0_0.png"), ("wan_vace", 2, "train_0.gif")]
)
def test_sources_whose_embeddings_are_stored_are_not_read_again(folders, tmp_path, monkeypatch, name, sources, first):
    """All of a large set's videos would be decoded at every start. A file that has changed is read anew."""
    recipe = load_recipe(write_recipe(tmp_path, name, folders[name], "mix"), ())
    texts, read = Setup(recipe).prompts, []
    for kind, method in ((Picture, "load"), (Video, "each")):
        inner = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda self, inner=inner: read.append(self.name) or inner(self))
    check_prompts(recipe, texts)
    assert len(read) == sources * len(texts)
    Policy.load(recipe, CPU, texts)
    read.clear()
    check_prompts(recipe, texts)
    assert read == []
    (tmp_path / first).write_bytes(b"something else")
    texts = Setup(recipe).prompts
    assert first in user_error(check_prompts, recipe, texts)
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"embedding_cache": "none"})})
    assert first in user_error(check_prompts, without, texts)


def test_a_prompt_file_without_pictures_is_one_line(folders, tmp_path):
    recipe = write_recipe(tmp_path, "flux_kontext", folders["flux_kontext"], "mix")
    (tmp_path / "train.jsonl").write_text('{"prompt": "make it red"}\n')
    said = refuse("train", recipe, "--out", tmp_path / "run")
    assert "'make it red' has 0 source pictures, and flux_kontext takes 1" in said
