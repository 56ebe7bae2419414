"""A run whose prompts carry videos: what lies beside its samples, and what it says of bad ones."""

import numpy as np
import pytest

from engine_cases import metrics_of, refuse, succeed
from flowgrove.data.sources import Video
from flowgrove.models.policy import Policy
from flowgrove.models.sources import fitted
from flowgrove.report.grids import load_grid
from model_recipes import write_recipe
from pictured import drawn_video, write_prompts

TEXTS = ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "which cannot be read"),
        (b"no video", "is no video that can be read"),
        (drawn_video("a", 3), "has 3 frames, and model.frames is 5"),
    ],
)
def test_a_bad_video_ends_a_run_before_its_model_loads(folders, tmp_path, monkeypatch, content, told):
    recipe = write_recipe(tmp_path, "wan_vace", folders["wan_vace"], "mix")
    bad = tmp_path / "train_1.gif"
    bad.unlink() if content is None else bad.write_bytes(content)
    monkeypatch.setattr(Policy, "load_together", lambda *_, **__: pytest.fail("a model was loaded"))
    said = refuse("train", recipe, "--out", tmp_path / "run")
    assert "train_1.gif" in said
    assert told in said


@pytest.mark.long
def test_source_videos_lie_beside_samples_and_in_grids(folders, tmp_path):
    av = pytest.importorskip("av")
    recipe = write_recipe(tmp_path, "wan_vace", folders["wan_vace"], "mix", lora={"rank": 4, "alpha": 8})
    write_prompts(tmp_path / "eval", TEXTS, 1, 5)
    settings = ("run.eval_every=1", "run.eval.samples=2", "run.iterations=1")
    succeed("train", recipe, "--out", tmp_path / "run", *(part for one in settings for part in ("--set", one)))
    videos = [Video(text, text, content=drawn_video(text, 5), frames=5).load() for text in TEXTS]
    grid = load_grid(tmp_path / "run" / "samples" / "iteration_000001.png")
    assert grid.sources.shape == (2, 2, 32, 32, 3), "a reference picture, and the middle frame"
    for row, frames in enumerate(videos):
        assert np.array_equal(grid.sources[row, 1], np.asarray(fitted(frames[2], 32, 32)))
    while_it_trained = metrics_of(tmp_path / "run")[-1]["eval_reward"]
    assert succeed("eval", tmp_path / "run")
    assert while_it_trained is not None
    prompts = write_prompts(tmp_path / "new", TEXTS, 1, 5)
    succeed("sample", tmp_path / "run", "--prompts", prompts, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "prompts.jsonl",
        *(f"{n:04d}_source_0.png" for n in range(2)),
        *(f"{n:04d}_{kind}.mp4" for n in range(2) for kind in ("source", "0", "1")),
    }
    for number, frames in enumerate(videos):
        with av.open(str(tmp_path / "out" / f"{number:04d}_source.mp4")) as file:
            found = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
        expected = np.stack([np.asarray(fitted(frame, 32, 32)) for frame in frames])
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 8
