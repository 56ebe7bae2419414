"""Going on from a checkpoint that is named by its path, and what counts as the same recipe."""

import resource
import signal

import numpy as np
import pytest
import torch

from checkpoint_cases import save_checkpoint
from engine_cases import metrics_of, refuse, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.recipe.loading import load_recipe
from flowgrove.run.finding import valid_checkpoints
from flowgrove.run.metrics import read_metrics
from flowgrove.run.resume import choose_checkpoint
from flowgrove.setup import Setup
from flowgrove.update.updater import Updater
from policy_cases import CPU, runner_of, small_recipe

RUN = {"iterations": 3, "checkpoint_every": 1, "eval_every": 0, "log": ["jsonl"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = tiny_recipe(folder, run=RUN)
    succeed("train", recipe, "--out", folder / "run")
    return recipe, folder / "run"


def test_going_back_to_an_older_checkpoint_leaves_one_branch(trained, tmp_path):
    recipe = tiny_recipe(tmp_path, run=RUN)
    run = tmp_path / "run"
    succeed("train", recipe, "--out", run)
    succeed("train", recipe, "--out", run, "--resume", run / "checkpoints" / "step_000001", "--set", "run.iterations=2")
    assert [path.name for path in valid_checkpoints(run)] == ["step_000001", "step_000002"]
    assert (run / "latest").resolve().name == "step_000002"
    assert [line["iteration"] for line in read_metrics(run)] == [0, 1]


def test_a_run_is_not_touched_by_a_checkpoint_of_another(trained, tmp_path):
    recipe, run = trained
    settings, elsewhere = load_recipe(recipe), tmp_path / "checkpoints" / "step_000001"
    with pytest.raises(UserError, match="is no checkpoint of it: give another --out"):
        choose_checkpoint(Setup(settings), run, str(elsewhere))


def test_another_learning_rate_goes_on_in_another_folder_only(trained, tmp_path):
    recipe, run = trained
    changed, checkpoint = load_recipe(recipe, ("update.lr=1e-5",)), run / "checkpoints" / "step_000003"
    with pytest.raises(UserError, match="written by another recipe"):
        choose_checkpoint(Setup(changed), run, str(checkpoint))
    assert choose_checkpoint(Setup(changed), tmp_path / "new", str(checkpoint)) == checkpoint


def test_the_prompts_text_decides_and_not_their_path_or_the_evaluation(tmp_path):
    first, moved, edited = (tiny_recipe(tmp_path / name) for name in ("first", "moved", "edited"))
    (edited.parent / "train.txt").write_text("a red circle at the centre\n")
    (moved.parent / "eval.txt").write_text("a blue square at the centre\n")
    prints = [Setup(load_recipe(path)).fingerprint for path in (first, moved, edited)]
    assert prints[0] == prints[1]
    assert prints[0] != prints[2]
    assert Setup(load_recipe(first, ("engine.token_budget=70",))).fingerprint == prints[0]
    assert Setup(load_recipe(first, ("update.clip_range=1e-3",))).fingerprint == prints[0], (
        "the value that the recipe has"
    )
    assert Setup(load_recipe(first, ("update.clip_range=2e-3",))).fingerprint != prints[0]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_one_line_and_leaves_nothing(tmp_path):
    recipe = small_recipe(model={"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False})
    policy = Policy.load(recipe, CPU)
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # the weights are 4 MB
    try:
        with pytest.raises(UserError, match="free some space") as caught:
            save_checkpoint(tmp_path, policy, updater, 1, "print", 3, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "checkpoints").iterdir())


@torch.no_grad()
def test_evaluation_may_take_other_steps_than_training(trained):
    from flowgrove.evaluation import sample
    from policy_cases import TEXTS, policy_of

    recipe = small_recipe(model={"adapter": "sd3", "path": "tiny", "dtype": "fp32"}, run={"eval": {"steps": 20}})
    same = small_recipe(model={"adapter": "sd3", "path": "tiny", "dtype": "fp32"}, rollout={"steps": 20, "shift": 1.5})
    policy = policy_of(dtype="fp32")
    assert torch.equal(
        sample(Setup(recipe), policy, runner_of(policy), TEXTS), sample(Setup(same), policy, runner_of(policy), TEXTS)
    )


def test_guidance_keeps_a_pass_within_the_token_budget():
    from policy_cases import policy_of

    plain, guided = policy_of(dtype="fp32", tokens=350), policy_of(dtype="fp32", guidance=3.0, tokens=350)
    assert runner_of(plain).budget.rows == runner_of(guided).budget.rows == 10
    for policy, rows in ((plain, 10), (guided, 5)):
        tokens = np.repeat(policy.encode(["a red circle"]).tokens, 40)
        assert [len(part) for part in runner_of(policy).budget.passes(tokens)] == [rows] * (40 // rows)


@pytest.mark.parametrize(
    "change",
    [
        "model.gradient_checkpointing=true", "model.vae_tiling=true", "engine.attention=sdpa",
        "engine.backend=reference", "engine.token_budget=500", "data.embedding_cache=none",
        "reward=[{name: http, url: 'http://other:1', retries: 9}]",
    ],
)  # fmt: skip
def test_how_a_run_is_computed_may_change_when_it_goes_on(tmp_path, change):
    path = tiny_recipe(tmp_path, reward=[{"name": "http", "url": "http://one:2"}])
    assert Setup(load_recipe(path)).fingerprint == Setup(load_recipe(path, (change,))).fingerprint
    for other in ("model.guidance_scale=2", "reward=[{name: http, url: 'http://one:2', weight: 2}]", "update.lr=1"):
        assert Setup(load_recipe(path)).fingerprint != Setup(load_recipe(path, (other,))).fingerprint


def test_keys_that_decide_nothing_may_be_written_or_left_out_when_a_run_goes_on(tmp_path):
    """A recipe without an engine section is that with one in which only the device is written."""
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 0})
    with_engine = recipe.read_text()
    assert "engine:\n  device: cpu\n" in with_engine
    without = with_engine.replace("engine:\n  device: cpu\n", "")
    for number, (before, after) in enumerate(((with_engine, without), (without, with_engine))):
        out = tmp_path / f"run{number}"
        recipe.write_text(before)
        succeed("train", recipe, "--out", out)
        recipe.write_text(after.replace("iterations: 1", "iterations: 2"))
        succeed("train", recipe, "--out", out)
        assert [line["iteration"] for line in metrics_of(out)] == [0, 1]
    assert "was written by another recipe" in refuse(
        "train", recipe, "--out", out, "--set", "engine.share=false", "--resume", out / "checkpoints" / "step_000002"
    )
