"""Kill and resume: the same weights to the last bit, the same metrics, no line twice and none
missing (issue 2, DESIGN §3.3).
"""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from engine_cases import (
    checkpoints,
    contents,
    flowgrove,
    metrics_of,
    refuse,
    succeed,
    timeless,
    tiny_recipe,
    weights_of,
)
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.grids import load_grid
from flowgrove.run.finding import best_checkpoint, find_checkpoint, mark_best
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from subprocesses import FLOWGROVE, environment

ITERATIONS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def recipe(folder):
    """Checkpoints after 2, 4 and 5 iterations; evaluation before iterations 0, 2, 4 and at the end;
    a window that moves.
    """
    return tiny_recipe(folder, run={"iterations": ITERATIONS, "checkpoint_every": 2, "eval_every": 2})


@pytest.fixture(scope="module")
def whole(folder, recipe):
    """The run in one go."""
    succeed("train", recipe, "--out", folder / "whole")
    assert checkpoints(folder / "whole") == ["step_000002", "step_000004", "step_000005"]
    return folder / "whole"


@pytest.fixture
def cut(whole, tmp_path):
    """A function: a copy of the whole run, cut back to what a kill leaves:
    `lines` metrics lines, checkpoints up to `newest`, no report.
    """

    def cut_back(lines, newest):
        run = tmp_path / "run"
        shutil.copytree(
            whole,
            run,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.html", "reward.png", "ratio.png", "before_after.png", "latest"),
        )
        told = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        assert len(told) == ITERATIONS
        (run / "metrics.jsonl").write_text("".join(told[:lines]), encoding="utf-8")
        for name in checkpoints(run):
            if int(name.removeprefix("step_")) > newest:
                shutil.rmtree(run / "checkpoints" / name)
        if newest:
            (run / "latest").symlink_to(Path("checkpoints") / f"step_{newest:06d}")
        return run

    return cut_back


def assert_same_run(run, whole):
    assert timeless(metrics_of(run)) == timeless(metrics_of(whole))
    assert checkpoints(run)[-1] == checkpoints(whole)[-1] == f"step_{ITERATIONS:06d}"
    found, expected = weights_of(run, ITERATIONS), weights_of(whole, ITERATIONS)
    assert list(found) == list(expected)
    assert found
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    moments = "checkpoints/step_000005/optimizer.safetensors"
    assert (run / moments).read_bytes() == (whole / moments).read_bytes()
    assert (run / "latest").resolve() == (run / "checkpoints" / "step_000005").resolve()
    assert (run / "report.html").is_file()
    assert {path.name: path.read_bytes() for path in (run / "samples").iterdir()} == {
        p.name: p.read_bytes() for p in (whole / "samples").iterdir()
    }


def test_the_reference_changes_weights_in_every_part_of_the_run(whole):
    """Else equal weights would prove nothing."""
    after = [weights_of(whole, step) for step in (2, 4, 5)]
    for early, late in ((0, 1), (1, 2)):
        assert sum(not torch.equal(after[early][name], after[late][name]) for name in after[0]) > len(after[0]) / 2
    lines = metrics_of(whole)
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS))
    assert len({line["reward"]["shapes"]["mean"] for line in lines}) == ITERATIONS


def test_two_runs_of_one_recipe_are_equal_and_another_seed_is_not(whole, recipe, tmp_path):
    succeed("train", recipe, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    succeed(
        "train",
        recipe,
        "--out",
        tmp_path / "other",
        "--set",
        "run.seed=7",
        "--set",
        "run.iterations=1",
        "--set",
        "run.eval_every=0",
    )
    assert metrics_of(tmp_path / "other")[0]["reward"] != metrics_of(whole)[0]["reward"]


# A real kill


def test_a_process_killed_in_the_middle_is_resumed_to_the_last_bit(whole, recipe, tmp_path):
    run = tmp_path / "run"
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*FLOWGROVE, "train", recipe, "--out", run], stdout=subprocess.PIPE, stderr=stderr, env=environment()
        )
    lines = 0
    try:
        while lines < 3 and process.poll() is None:
            time.sleep(0.005)
            lines = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    finally:
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    assert 3 <= (run / "metrics.jsonl").read_bytes().count(b"\n") < ITERATIONS
    assert "step_000002" in checkpoints(run)
    assert "step_000005" not in checkpoints(run)
    assert not (run / "report.html").exists()
    assert printed == b""
    shown = [line for line in (tmp_path / "stderr").read_text().splitlines() if line.strip()]
    # nothing but its lines: libraries are quiet
    assert [line.split()[0] for line in shown] == [str(number) for number in range(len(shown))]
    succeed("train", recipe, "--out", run, "--resume", "auto")
    assert_same_run(run, whole)


# What kills leave behind


MOMENTS = [(3, 2), (4, 5), (1, 0)]
MORE_MOMENTS = [
    pytest.param(*moment, marks=pytest.mark.long) for moment in ((0, 0), (1, 2), (2, 2), (4, 2), (3, 4), (4, 4), (5, 4))
]


@pytest.mark.parametrize(("lines", "newest"), [*MOMENTS, *MORE_MOMENTS])
def test_any_moment_is_one_to_resume_from(whole, recipe, cut, lines, newest):
    """`lines` metrics lines beside a checkpoint of `newest` iterations:
    one line less if the kill came between the two.
    """
    run = cut(lines, newest)
    succeed("train", recipe, "--out", run)
    assert_same_run(run, whole)


HALF = '{"iteration": 2, "reward": {"sha'
MORE_HALVES = [pytest.param(half, marks=pytest.mark.long) for half in ("{", '{"iteration": 2', "\x00\x00\x00")]


@pytest.mark.parametrize("half", [HALF, *MORE_HALVES])
def test_a_half_written_line_does_no_harm(whole, recipe, cut, half):
    run = cut(2, 2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(half)
    succeed("train", recipe, "--out", run)
    assert_same_run(run, whole)


def test_leftovers_of_a_checkpoint_in_the_making_do_no_harm(whole, recipe, cut):
    run = cut(3, 2)
    partial = run / "checkpoints" / "step_000004.partial"
    partial.mkdir()
    (partial / "weights.safetensors").write_bytes(b"half")
    (partial / "state.json").write_text("{")
    (run / "latest.partial").symlink_to("checkpoints/step_000004.partial")
    succeed("train", recipe, "--out", run)
    assert_same_run(run, whole)
    assert not [path for path in (run / "checkpoints").iterdir() if path.name == partial.name]


def test_a_report_that_was_not_written_is_written(whole, recipe, cut):
    run = cut(5, 5)
    succeed("train", recipe, "--out", run)
    assert_same_run(run, whole)


def test_resume_takes_a_checkpoint_by_its_path(whole, recipe, cut):
    run = cut(5, 4)
    succeed("train", recipe, "--out", run, "--resume", run / "checkpoints" / "step_000002")
    assert_same_run(run, whole)


def test_a_finished_run_can_be_made_longer(whole, recipe, tmp_path):
    """What decides the weights is the recipe without run.*: only the length differs here."""
    run = tmp_path / "run"
    succeed("train", recipe, "--out", run, "--set", "run.iterations=2")
    assert checkpoints(run) == ["step_000002"]
    succeed("train", recipe, "--out", run)
    assert timeless(metrics_of(run)) == timeless(metrics_of(whole)), (
        "the evaluation that ended the short run is no end any more"
    )
    assert all(
        torch.equal(weight, weights_of(whole, ITERATIONS)[name]) for name, weight in weights_of(run, ITERATIONS).items()
    )
    assert load_recipe(run / "recipe.yaml").run.iterations == ITERATIONS


def test_averages_of_lora_weights_are_resumed_too(tmp_path):
    recipe = tiny_recipe(
        tmp_path, model={"lora": {"rank": 2, "alpha": 4}}, update={"lr": 1e-3, "ema_decay": 0.5}, run={"iterations": 2}
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    succeed("train", recipe, "--out", whole)
    succeed("train", recipe, "--out", run, "--set", "run.iterations=1", "--set", "run.eval_every=0")
    succeed("train", recipe, "--out", run)
    assert timeless(metrics_of(run))[1:] == timeless(metrics_of(whole))[1:]
    files = {
        path.name: path.read_bytes()
        for path in (whole / "checkpoints" / "step_000002").iterdir()
        if path.suffix == ".safetensors"
    }
    assert len(files) >= 3  # weights, moments, averages
    assert len({*files.values()}) == len(files)
    assert {name: (run / "checkpoints" / "step_000002" / name).read_bytes() for name in files} == files


# Finished, other and damaged runs


def test_a_finished_run_is_one_line_and_no_change(whole, recipe):
    before = contents(whole)
    result = succeed("train", recipe, "--out", whole)
    (line,) = result.stderr.splitlines()
    assert "finished" in line
    assert str(whole) in line
    assert result.stdout == ""
    assert contents(whole) == before


OTHERS = {
    "update.lr=2e-4": "update.lr is 0.0002 instead of the run's 0.0001",
    "rollout.noise_level=0.5": "rollout.noise_level is 0.5 instead of the run's 0.7",
    "data.prompts_per_iteration=1": "data.prompts_per_iteration is 1 instead of the run's 2",
    "run.seed=3": "run.seed is 3 instead of the run's 42",
    "reward=[{name: shapes, weight: 2}]": "reward.0.weight is 2.0 instead of the run's 1.0",
    "model.lora={rank: 2, alpha: 4}": "instead of the run's null",
}


@pytest.mark.parametrize("override", OTHERS)
def test_another_recipe_does_not_go_into_the_same_folder(whole, recipe, override):
    before = contents(whole)
    by_name = refuse("train", recipe, "--out", whole, "--set", override)
    by_path = refuse(
        "train", recipe, "--out", whole, "--set", override, "--resume", whole / "checkpoints" / "step_000002"
    )
    for line in (by_name, by_path):
        assert str(whole) in line
        assert OTHERS[override] in line
        assert f"resume with {whole / 'recipe.yaml'}" in line
    assert "give another --out" in by_name
    assert contents(whole) == before


def test_a_run_goes_on_with_what_force_lets_change(whole, recipe, cut):
    """The folder keeps the recipe of its newest checkpoint, so that a kill before the next one changes nothing."""
    run = cut(4, 4)
    options = ("--out", run, "--set", "update.lr=2e-4", "--set", "update.clip_range=2e-3")
    line = refuse("train", recipe, *options)
    assert line.endswith("or --force to go on with the recipe as it is now")
    result = succeed("train", recipe, *options, "--force")
    told = result.stderr.splitlines()[0]
    assert "update.lr is 0.0002 instead of the run's 0.0001, update.clip_range is 0.002" in told
    assert load_recipe(run / "recipe.yaml").update.lr == 2e-4
    assert timeless(metrics_of(run))[:4] == timeless(metrics_of(whole))[:4]
    found, expected = weights_of(run, ITERATIONS), weights_of(whole, ITERATIONS)
    assert any(not torch.equal(found[name], weight) for name, weight in expected.items())
    assert "finished" in succeed("train", recipe, *options).stderr
    older = run / "checkpoints" / "step_000002"
    assert "or --force has changed a key since" in refuse("train", recipe, *options, "--resume", older)


LASTING = {
    "model.lora={rank: 2, alpha: 4}": "model.lora is {",
    "model.guidance_scale=2": "model.guidance_scale is 2.0",
    "update.optimizer=adamw_8bit": 'update.optimizer is "adamw_8bit"',
    "update.ema_decay=0.9": "update.ema_decay is 0.9 instead of the run's null",
}


@pytest.mark.parametrize("override", LASTING)
def test_force_does_not_change_what_checkpoints_hold(whole, recipe, override):
    before = contents(whole)
    line = refuse("train", recipe, "--out", whole, "--force", "--set", "update.lr=2e-4", "--set", override)
    assert f"--force cannot change what its checkpoints hold: {LASTING[override]}" in line
    assert "update.lr" not in line
    assert contents(whole) == before


def test_a_forced_run_that_is_stopped_before_its_next_checkpoint_changes_nothing(whole, recipe, cut):
    run = cut(4, 4)
    before = (run / "recipe.yaml").read_bytes()
    changed = load_recipe(recipe, ("update.lr=2e-4",))
    trainer = Trainer(Setup(changed), run, force=True, say=lambda _: None)
    trainer._release()
    assert (run / "recipe.yaml").read_bytes() == before
    succeed("train", recipe, "--out", run)
    assert_same_run(run, whole)


def test_other_prompts_in_the_same_file_are_named(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 0})
    succeed("train", recipe, "--out", tmp_path / "run")
    (tmp_path / "train.txt").write_text("a red circle at the centre\n")
    assert "data.prompts holds other prompts than when it began" in refuse("train", recipe, "--out", tmp_path / "run")


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "weights cut": lambda folder: halved(folder / "weights.safetensors"),
    "weights empty": lambda folder: (folder / "weights.safetensors").write_bytes(b""),
    "weights missing": lambda folder: (folder / "weights.safetensors").unlink(),
    "weights of another model": lambda folder: shutil.copy(
        folder / "optimizer.safetensors", folder / "weights.safetensors"
    ),
    "optimiser cut": lambda folder: halved(folder / "optimizer.safetensors"),
    "optimiser missing": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "optimiser of nothing": lambda folder: shutil.copy(
        folder / "weights.safetensors", folder / "optimizer.safetensors"
    ),
    "state cut": lambda folder: halved(folder / "state.json"),
    "state empty": lambda folder: (folder / "state.json").write_text(""),
    "state of nothing": lambda folder: (folder / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(recipe, cut, damage):
    run = cut(2, 2)
    checkpoint = run / "checkpoints" / "step_000002"
    DAMAGE[damage](checkpoint)
    before = contents(run)
    assert str(checkpoint) in refuse("train", recipe, "--out", run)
    assert str(checkpoint) in refuse("train", recipe, "--out", run, "--resume", checkpoint)
    assert contents(run) == before


def test_a_run_from_before_manifests_goes_on_to_the_same_bits(whole, recipe, cut):
    """Its checkpoints are those of today without manifest.json and with format 1."""
    run = cut(2, 2)
    checkpoint = run / "checkpoints" / "step_000002"
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "format": 1}))
    result = succeed("train", recipe, "--out", run)
    assert "damaged" not in result.stderr
    assert_same_run(run, whole)


@pytest.mark.parametrize("damage", ["weights cut", pytest.param("state cut", marks=pytest.mark.long)])
def test_a_damaged_newest_checkpoint_does_not_spoil_the_run(whole, recipe, cut, damage):
    """It is named, and the run goes on from the newest whole one to the same bits."""
    run = cut(4, 4)
    DAMAGE[damage](run / "checkpoints" / "step_000004")
    result = flowgrove("train", recipe, "--out", run)
    assert result.exit_code == 0
    assert_same_run(run, whole)
    told = result.stderr.splitlines()[0]
    assert told.startswith(f"{run / 'checkpoints' / 'step_000004'} is damaged (")
    assert told.endswith("going on from step_000002 instead")


@pytest.mark.parametrize("damage", ["weights cut", "state cut"])
def test_a_damaged_checkpoint_cannot_be_drawn_with(recipe, cut, tmp_path, damage):
    run = cut(5, 5)
    DAMAGE[damage](run / "checkpoints" / "step_000005")
    assert "step_000005" in refuse("sample", run, "--prompts", recipe.parent / "eval.txt", "--out", tmp_path / "out")


# Which checkpoints stay


@pytest.mark.parametrize(
    ("keep", "stay"), [pytest.param(1, ["step_000004"], marks=pytest.mark.long), (2, ["step_000003", "step_000004"])]
)
def test_only_the_newest_checkpoints_stay(recipe, tmp_path, keep, stay):
    options = [
        "--set",
        f"run.keep_last={keep}",
        "--set",
        "run.checkpoint_every=1",
        "--set",
        "run.iterations=4",
        "--set",
        "run.eval_every=0",
    ]
    succeed("train", recipe, "--out", tmp_path / "run", *options)
    assert checkpoints(tmp_path / "run") == stay
    assert (tmp_path / "run" / "latest").resolve().name == "step_000004"


def test_the_best_held_out_checkpoint_stays_beside_the_newest(recipe, tmp_path):
    """And is found again when the run goes on; the evaluation needs no checkpoint_every of its own."""
    run, options = (
        tmp_path / "run",
        ["--set", "run.keep_best=true", "--set", "run.keep_last=1", "--set", "run.checkpoint_every=0"],
    )
    options += ["--set", "run.eval_every=1", "--set", "update.lr=1e-3"]
    succeed("train", recipe, "--out", run, *options, "--set", "run.iterations=3")
    succeed("train", recipe, "--out", run, *options)
    scores = {int(path.stem[-6:]): load_grid(path).scores.mean() for path in (run / "samples").glob("*.png")}
    best = max((number for number in scores if number), key=lambda number: (scores[number], -number))
    assert find_checkpoint(run, "best").name == f"step_{best:06d}"
    assert checkpoints(run) == sorted({f"step_{best:06d}", f"step_{ITERATIONS:06d}"})
    assert best_checkpoint(run)[1] == pytest.approx(scores[best])


def test_the_best_under_another_judge_is_no_best(recipe, tmp_path):
    """Rewards of other prompts say nothing of each other."""
    run = tmp_path / "run"
    told = ("run.keep_best=true", "run.eval_every=1", "run.checkpoint_every=1", "run.keep_last=9")
    options = [part for one in told for part in ("--set", one)]
    succeed("train", recipe, "--out", run, *options, "--set", "run.iterations=2")
    first = best_checkpoint(run)
    mark_best(run / "checkpoints" / "step_000001", 100.0, first.judge)
    succeed("train", recipe, "--out", run, *options, "--set", "run.iterations=3")
    assert best_checkpoint(run).reward == 100.0, "the same judge"
    other = tmp_path / "other.txt"
    other.write_text("a red circle at the centre\n")
    succeed("train", recipe, "--out", run, *options, "--set", f"data.eval_prompts={other}", "--set", "run.iterations=4")
    best = best_checkpoint(run)
    assert best.judge != first.judge
    assert best.reward == max(line["eval_reward"] for line in metrics_of(run)[3:])


def test_a_branch_that_was_left_is_gone_before_anything_is_saved(recipe, tmp_path, monkeypatch):
    """Else a start after an error would go on from it, behind metrics that are no longer there."""
    run = tmp_path / "run"
    options = ["--set", "run.checkpoint_every=1", "--set", "run.keep_last=4", "--set", "run.eval_every=0"]
    succeed("train", recipe, "--out", run, *options, "--set", "run.iterations=3")

    def fails(*_):
        raise UserError("the reward is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "run", fails)
        back = run / "checkpoints" / "step_000001"
        assert "the reward is gone" in refuse("train", recipe, "--out", run, *options, "--resume", back)
    assert checkpoints(run) == ["step_000001"]
    assert (run / "latest").resolve().name == "step_000001"
    succeed("train", recipe, "--out", run, *options, "--set", "run.iterations=3")
    assert [line["iteration"] for line in metrics_of(run)] == [0, 1, 2]


def test_a_checkpoint_without_averages_is_not_called_damaged(whole, recipe, tmp_path):
    told = refuse(
        "train", recipe, "--out", tmp_path / "new", "--resume", whole / "latest", "--set", "update.ema_decay=0.9"
    )
    assert "holds no averaged weights: write null" in told
    assert "damaged" not in told


def test_the_folder_of_a_run_can_be_moved(whole, recipe, tmp_path):
    run = tmp_path / "elsewhere" / "moved"
    shutil.copytree(whole, run, symlinks=True)
    assert not (run / "latest").readlink().is_absolute()
    assert (run / "latest" / "weights.safetensors").read_bytes() == (
        whole / "latest" / "weights.safetensors"
    ).read_bytes()
    assert "finished" in succeed("train", recipe, "--out", run).stderr
