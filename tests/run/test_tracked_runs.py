"""Whole runs with trackers: what these are told, and that nothing they do is anything to the run."""

import io
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from engine_cases import EVAL_PROMPTS, contents, metrics_of, refuse, succeed, timeless, tiny_recipe, weights_of
from flowgrove.recipe.loading import load_recipe, parse_recipe
from flowgrove.report.grids import load_grid
from flowgrove.run import tracking
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.run.trackers.interface import flat
from flowgrove.run.tracking import Trackers
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from planner_cases import recipe_content
from tracker_cases import pixels, stand_in

RUN = {"iterations": 3, "eval_every": 2, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that nobody tracks."""
    folder = tmp_path_factory.mktemp("plain")
    succeed("train", tiny_recipe(folder, run=RUN), "--out", folder / "run")
    return folder / "run"


def tracked(folder, name="wandb", **changes):
    return tiny_recipe(folder, run={**RUN, "log": [name], **changes})


def same(run, plain):
    """Whether a run has the bits of the one that nobody tracks, in all that is told of it too."""
    assert timeless(metrics_of(run)) == timeless(metrics_of(plain))
    expected = weights_of(plain, 3)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(run, 3).items())
    pictures = [
        {name: content for name, content in contents(each / "samples").items() if name.endswith(".png")}
        for each in (run, plain)
    ]
    assert pictures[0] == pictures[1]
    return True


def numbers_of(line):
    return {
        name: float(value)
        for name, value in flat(line).items()
        if name != "iteration" and isinstance(value, int | float)
    }


def test_a_tracker_is_told_the_run(tmp_path, monkeypatch, plain, capfd):
    calls = stand_in(tmp_path, monkeypatch)
    recipe = tracked(tmp_path, tracking={"project": "shapes", "tags": ["a", "b"], "mode": "offline", "entity": "me"})
    said = succeed("train", recipe, "--out", tmp_path / "run").stderr
    first, *logs, last = calls()
    run = tmp_path / "run"
    assert "Weights & Biases: https://tracker.example/run" in said
    assert first["config"] == load_recipe(recipe).model_dump(mode="json")
    told = {name: first[name] for name in ("project", "entity", "name", "group", "tags", "mode")}
    assert told == {
        "project": "shapes", "entity": "me", "name": "run", "group": None, "tags": ["a", "b"], "mode": "offline",
    }  # fmt: skip
    assert [(one["step"], one["values"]) for one in logs if one["values"]] == [
        (line["iteration"] + 1, numbers_of(line)) for line in metrics_of(run)
    ]
    shown = {one["step"]: one["images"] for one in logs if one["images"]}
    assert sorted(shown) == [0, 2, 3]
    for completed, images in shown.items():
        grid = load_grid(run / "samples" / f"iteration_{completed:06d}.png")
        assert [image["caption"] for image in images] == [
            f"{prompt} ({grid.scores[row, 0]:.3f})" for row, prompt in enumerate(EVAL_PROMPTS)
        ]
        assert all(np.array_equal(pixels(image), grid.tiles[row, 0]) for row, image in enumerate(images))
    assert last["exit_code"] == 0
    assert same(run, plain)
    assert "Traceback" not in capfd.readouterr().err


HOSTILE = {
    "does as it likes": {
        "INIT": "signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.exit = os.abort = lambda *_: None; "
        "sys.excepthook = threading.excepthook = None; os.chdir('/'); os.environ.clear()",
        "LOG": "random.seed(1); import numpy; numpy.random.seed(1)",
    },
    "ends the process": {"LOG": "signal.raise_signal(signal.SIGINT); os._exit(1)"},
    "hangs": {"LOG": "time.sleep(600)"},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_that_a_tracker_does_is_anything_to_the_run(tmp_path, monkeypatch, plain, case):
    stand_in(tmp_path, monkeypatch)
    for where, does in HOSTILE[case].items():
        monkeypatch.setenv(f"TRACKER_ON_{where}", does)
    monkeypatch.setitem(tracking._LONGEST, "finished", 3.0 if case == "hangs" else 60.0)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    hooks = threading.excepthook
    succeed("train", tracked(tmp_path), "--out", tmp_path / "run")
    assert same(tmp_path / "run", plain)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.get_rng_state().tolist() == states[2]
    assert threading.excepthook is hooks
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracker")]


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("flowgrove.run.trackers.registry.is_installed", lambda name: name != "swanlab")
    text = refuse("train", tracked(tmp_path, "swanlab"), "--out", tmp_path / "run")
    assert text == (
        "error: run.log asks for swanlab, which is not installed: pip install swanlab, or take swanlab out of run.log"
    )
    assert not (tmp_path / "run").exists()


def stopped(recipe, run, at, how=KeyboardInterrupt):
    """Trains until the reward of iteration `at`, which a signal interrupts."""
    with Stopping() as stop:
        trainer = Trainer(Setup(load_recipe(recipe)), run, stopping=stop)
        inner, count = trainer.stages.rewards, iter(range(100))

        class Rewards:
            def __getattr__(self, name):
                return getattr(inner, name)

            def __call__(self, *arguments):
                if next(count) == at:
                    stop._hear(15, None)
                return inner(*arguments)

        trainer.stages.rewards = Rewards()
        with pytest.raises(Stopped):
            trainer.run()


def test_a_run_that_was_stopped_is_the_same_one_when_it_goes_on(tmp_path, monkeypatch, plain):
    calls = stand_in(tmp_path, monkeypatch)
    recipe, run = tracked(tmp_path), tmp_path / "run"
    stopped(recipe, run, 1)
    before = calls()
    assert before[-1]["exit_code"] == 255
    succeed("train", recipe, "--out", run)
    after = calls()[len(before) :]
    assert after[0]["id"] == before[0]["id"]
    steps = [one["step"] for part in (before, after) for one in part if one["call"] == "log" and one["values"]]
    assert steps == [1, 2, 3]
    assert after[-1]["exit_code"] == 0
    assert same(run, plain)


def test_a_run_that_fails_is_told_as_such(tmp_path, monkeypatch):
    calls = stand_in(tmp_path, monkeypatch)
    trainer = Trainer(Setup(load_recipe(tracked(tmp_path))), tmp_path / "run")

    def fails(line):
        raise RuntimeError("of the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        trainer.run(fails)
    assert calls()[-1]["exit_code"] == 1
    assert trainer.trackers is None


def test_tensorboard_shows_the_grids_of_a_run_that_was_stopped(tmp_path):
    """Those before the checkpoint's line too, which is written anew."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, run = tracked(tmp_path, "tensorboard"), tmp_path / "run"
    stopped(recipe, run, 2)
    stopped(recipe, run, 0)
    succeed("train", recipe, "--out", run)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    lines = metrics_of(run)
    assert [event.step for event in events.Scalars("loss")] == [line["iteration"] for line in lines]
    for row in range(2):
        found = events.Images(f"samples/{row}")
        assert [event.step for event in found] == [0, 2, 3]
        for event in found:
            grid = load_grid(run / "samples" / f"iteration_{event.step:06d}.png")
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), grid.tiles[row, 0])


def test_names_and_passwords_in_addresses_stay_here(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(tracking, "Feed", lambda title, tracker, opening, *_: opened.append(opening))
    content = recipe_content()
    content["run"] = {"log": ["tensorboard", "tensorboard"]}
    content["reward"] = [
        {"name": "http", "options": {"url": "http://user:secret@host:8000/score?mail=a@b"}},
        {"name": "shapes"},
    ]
    Trackers(parse_recipe(content), tmp_path / "name of it", 3, print)
    (opening,) = opened
    assert opening.recipe["reward"][0]["options"]["url"] == "http://host:8000/score?mail=a@b"
    assert (opening.name, opening.first_iteration) == ("name of it", 3)
