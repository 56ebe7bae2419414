"""What goes wrong inside an iteration, by the rows of docs/faults.md: what is left out, what is counted, what ends the
run and what is saved then.
"""

import errno
import math
import threading

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from engine_cases import (
    checkpoints,
    flowgrove,
    metrics_of,
    refuse,
    succeed,
    timeless,
    tiny_recipe,
    weights_of,
    write_lines,
)
from flowgrove.credit import assign_credit
from flowgrove.iteration import NothingScoredError, Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.recipe.schema import Credit
from flowgrove.report.grids import load_grid
from flowgrove.rewards import faults
from flowgrove.rewards.faults import RewardError
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout import loop
from flowgrove.rollout.loop import rollout
from flowgrove.run.metrics import MetricsLog
from flowgrove.run.summaries import update_summary
from flowgrove.setup import Setup
from flowgrove.update.optimizers import state_tensors
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from host_reads import count_host_reads
from policy_cases import CPU, TEXTS, plan_and_coefficients, small_recipe
from rank_cases import CASES, FP64, assert_same, last, written
from torchrun import torchrun, train
from update_cases import Recorder

# One number of a gradient is not finite, on the last rank, in some updates: (iteration, update) of two each.
POISON = """
import os
from flowgrove.update.updater import Updater

step = Updater._step

def poisoned(self, stats, trained, iteration, number, updates):
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if last and (iteration, number) in {poisoned_updates}:
        self.parameters[3].grad.view(-1)[0] = float("{value}")
    step(self, stats, trained, iteration, number, updates)

Updater._step = poisoned
"""
COMMAND = "from flowgrove.cli import app\n\napp()\n"


def poison(monkeypatch, updates, value="nan"):
    """Inside this process."""
    monkeypatch.setattr(Updater, "_step", Updater._step)  # put back afterwards
    exec(POISON.format(poisoned_updates=set(updates), value=value), {})


def ended(*arguments):
    """The line with which a run ends after some iterations: exit code 2 and one error line, the last on stderr."""
    result = flowgrove(*arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r} instead of an error line"
    assert result.exit_code == 2, result.stderr
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


def updater_and_parts(ema_decay=0.9):
    recipe = small_recipe(update={"updates_per_iteration": 2, "clip_range": 1e-3, "lr": 1e-3, "ema_decay": ema_decay})
    policy = Policy.load(recipe, CPU, TEXTS)
    updater = Updater(recipe, policy, PassRunner.of(recipe, policy))

    def parts(iteration):
        plan, rows = plan_and_coefficients(recipe, iteration)
        prompts = policy.encode(TEXTS)
        forest = rollout(plan, rows, policy, prompts, updater.runner, seed=1, iteration=iteration)
        scores = np.random.default_rng(iteration).random((len(TEXTS), plan.leaves, 1))
        return [Rolled(policy, forest, prompts, assign_credit(plan, recipe.credit, scores, [1.0]), rows)]

    return updater, parts


def state_of(updater):
    names = updater.weights.trainable()
    return {
        **{f"weights/{name}": p.detach().clone() for name, p in names.items()},
        **{f"ema/{name}": average.clone() for name, average in updater.ema.average.items()},
        **{key: tensor.clone() for key, tensor in state_tensors(updater.optimizer, names).items()},
    }


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_gradient_that_is_not_finite_leaves_weights_moments_count_and_average(value, monkeypatch):
    updater, parts = updater_and_parts()
    updater.run(parts(0))
    before, made = state_of(updater), parts(1)
    poison(monkeypatch, {(1, 0), (1, 1)}, value)
    stats = updater.run(made)
    assert differing(state_of(updater), before) == []
    found = update_summary(stats)
    assert (found["skipped_updates"], found["grad_norm"]) == (2, None)
    assert all(math.isfinite(found[key]) for key in ("ratio_mean", "ratio_min", "ratio_max", "approx_kl", "loss"))
    updater.run(parts(2))
    assert {name.partition("/")[0] for name in differing(state_of(updater), before)} >= {"weights", "ema"}
    assert {float(t) for name, t in state_of(updater).items() if name.endswith("/step")} == {4.0}


def test_other_updates_of_the_iteration_count_alone_in_its_numbers(monkeypatch):
    updater, parts = updater_and_parts()
    clean = update_summary(updater.run(parts(0)))
    assert clean["skipped_updates"] == 0
    poison(monkeypatch, {(1, 1)})
    found = update_summary(updater.run(parts(1)))
    assert found["skipped_updates"] == 1
    assert 0 < found["grad_norm"] < math.inf


def test_ratios_that_are_not_finite_are_left_out_of_the_others_numbers():
    updater, parts = updater_and_parts()
    made = parts(0)
    made[0].forest.states[made[0].forest.first_row[1]] = math.nan  # one state of one prompt
    found = update_summary(updater.run(made))
    assert found["loss"] is None
    assert found["skipped_updates"] >= 1
    assert found["ratio_mean"] == pytest.approx(1, abs=1e-2)
    assert found["ratio_min"] <= found["ratio_mean"] <= found["ratio_max"]
    assert 0 <= found["clipped_low"] + found["clipped_high"] <= 1


def test_skipping_an_update_is_decided_without_the_host(monkeypatch):
    updater, parts = updater_and_parts()
    updater.run(parts(0))  # the optimiser's state exists from here on
    made = parts(1)
    poison(monkeypatch, {(1, 0)})
    assert count_host_reads(lambda: updater.run(made)) == 0


def test_a_run_with_too_many_skipped_updates_saves_the_last_good_weights_and_ends(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, run={"iterations": 20, "checkpoint_every": 100, "most_skipped_updates": 3})
    poison(monkeypatch, {(iteration, number) for iteration in range(2, 20) for number in range(2)})
    text = ended("train", recipe, "--out", tmp_path / "run", "--set", "run.eval_every=0")
    assert "run.most_skipped_updates" in text
    assert "4 updates in a row" in text  # counted after whole iterations
    assert [line["skipped_updates"] for line in metrics_of(tmp_path / "run")] == [0, 0, 2, 2]
    assert checkpoints(tmp_path / "run") == ["step_000004"]
    assert str(tmp_path / "run" / "checkpoints" / "step_000004") in text
    short = tiny_recipe(tmp_path, run={"iterations": 2, "checkpoint_every": 1, "eval_every": 0})
    succeed("train", short, "--out", tmp_path / "good")
    good, kept = weights_of(tmp_path / "good", 2), weights_of(tmp_path / "run", 4)
    assert differing(kept, good) == []


def test_single_skipped_updates_end_no_run(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, run={"iterations": 4, "eval_every": 0, "most_skipped_updates": 1})
    poison(monkeypatch, {(0, 1), (1, 0), (2, 1)})
    result = succeed("train", recipe, "--out", tmp_path / "run")
    assert [line["skipped_updates"] for line in metrics_of(tmp_path / "run")] == [1, 1, 1, 0]
    assert result.stderr.count("1 update skipped") == 3


# Prompts that are left out

PICKY = """
import os
from pathlib import Path

def score(pictures, prompts):
    switch = Path(__file__).with_suffix(".off")
    if any("purple" in prompt for prompt in prompts) or switch.exists():
        raise ValueError("not these")
    return [0.0] * len(prompts)
"""
SHAPES_AND_PICKY = [{"name": "shapes"}, {"name": "python", "file": "picky.py", "weight": 0.5}]


@pytest.fixture
def picky(tmp_path, monkeypatch):
    """A reward that refuses one of the prompts, and all of them while its switch is there."""
    monkeypatch.setattr(faults, "_WAIT", 0.0)
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")
    (tmp_path / "picky.py").write_text(PICKY)
    return tmp_path / "picky.off"


@pytest.mark.long
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_several_ranks_skip_and_leave_out_what_one_does(distributed, tmp_path, picky, monkeypatch):
    """One rank spoils an update, and one has a prompt that cannot be scored, which is held out too."""
    case = {**CASES["tree pruned by reward"], "credit": {"std": "global", "prune": {"kind": "extreme", "keep": 1}}}
    case["model"] = FP64 if distributed == "fsdp2" else case["model"]
    recipe = written(tmp_path, reward=SHAPES_AND_PICKY, **case)
    (tmp_path / "spoilt.py").write_text(POISON.format(poisoned_updates={(1, 0)}, value="nan") + COMMAND)
    poison(monkeypatch, {(1, 0)})
    succeed("train", recipe, "--out", tmp_path / "one")
    options = ("--set", f"engine.distributed={distributed}", "--out", tmp_path / "several")
    torchrun(2, tmp_path / "spoilt.py", "train", recipe, *options, output=tmp_path / "log")
    assert_same(tmp_path / "several", tmp_path / "one")
    lines = metrics_of(tmp_path / "several")
    assert [(line["skipped_updates"], line["dropped_prompts"]) for line in lines] == [(0, 1), (1, 1), (0, 1)]
    steps = {float(tensor) for key, tensor in last(tmp_path / "several", "optimizer").items() if key.endswith("/step")}
    assert steps == {5.0}
    text = (tmp_path / "log").read_text()
    assert text.count("leaves out 1 prompt: reward python") == 3 + 3  # iterations, evaluations


@pytest.mark.long
def test_ranks_of_which_none_scores_anything_end_with_one_line_and_a_checkpoint(tmp_path, picky):
    recipe = written(tmp_path, reward=SHAPES_AND_PICKY, **CASES["tree pruned by reward"])
    options = ("train", recipe, "--set", "engine.distributed=ddp", "--out", tmp_path / "run")
    (tmp_path / "switched.py").write_text(
        "from pathlib import Path\nfrom flowgrove.iteration import Stages\n\nrun = Stages.run\n\n"
        "def switched(self, texts, iteration, *rest):\n    if iteration == 1:\n"
        f"        Path({str(picky)!r}).touch()\n    return run(self, texts, iteration, *rest)\n\n"
        f"Stages.run = switched\n\n{COMMAND}"
    )
    text = torchrun(2, tmp_path / "switched.py", *options, output=tmp_path / "log", code=1)
    assert text.count("error: ") == 1
    assert "not these; saved" in " ".join(text.split())
    assert checkpoints(tmp_path / "run") == ["step_000001"]
    picky.unlink()
    train(2, *options[1:], output=tmp_path / "log")
    assert len(metrics_of(tmp_path / "run")) == 3


def test_what_is_left_out_enters_no_number_of_the_iteration(tmp_path, picky, caplog):
    recipe = written(tmp_path, reward=SHAPES_AND_PICKY, **CASES["tree pruned by reward"])
    succeed("train", recipe, "--out", tmp_path / "run")
    for line in metrics_of(tmp_path / "run"):
        assert line["dropped_prompts"] == 1
        assert line["reward"]["python"] == {"mean": 0.0, "std": 0.0, "group_std": 0.0}
        assert line["train_passes"] > 0
        assert math.isfinite(line.get("eval_reward", 0.0))
    told = [message for message in caplog.messages if "leaves out" in message]
    assert len(told) == 3 + 3
    assert all("1 prompt: reward python:" in line and "not these" in line for line in told)


def test_a_run_of_which_no_prompt_is_scored_saves_ends_and_goes_on(tmp_path, picky, monkeypatch):
    recipe = tiny_recipe(
        tmp_path, reward=SHAPES_AND_PICKY, run={"iterations": 3, "checkpoint_every": 0, "eval_every": 0}
    )
    succeed("train", recipe, "--out", tmp_path / "whole")
    run = Stages.run

    def switched(self, texts, iteration, *rest):
        if iteration == 2:
            picky.touch()
        return run(self, texts, iteration, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "run", switched)
        text = ended("train", recipe, "--out", tmp_path / "run")
    assert "not these; saved" in text
    assert str(tmp_path / "run" / "checkpoints" / "step_000002") in text
    assert len(metrics_of(tmp_path / "run")) == 2
    picky.unlink()
    succeed("train", recipe, "--out", tmp_path / "run")
    assert differing(weights_of(tmp_path / "run", 3), weights_of(tmp_path / "whole", 3)) == []


def test_a_reward_that_is_broken_from_the_start_ends_the_run_with_its_own_line(tmp_path, picky):
    picky.touch()
    recipe = tiny_recipe(tmp_path, reward=SHAPES_AND_PICKY, run={"eval_every": 0})
    text = refuse("train", recipe, "--out", tmp_path / "run")
    assert text.endswith("picky.py, line 8: ValueError: not these")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_without_scores_is_recorded_as_missing_and_the_run_goes_on(tmp_path, picky, caplog):
    recipe = tiny_recipe(tmp_path, reward=SHAPES_AND_PICKY, run={"iterations": 2, "eval_every": 1, "keep_best": True})
    write_lines(tmp_path / "eval.txt", ["a purple square at the centre"])
    result = succeed("train", recipe, "--out", tmp_path / "run")
    assert [line["eval_reward"] for line in metrics_of(tmp_path / "run")] == [None, None]
    assert "held-out unknown" in result.stderr
    assert sum("the evaluation after" in message for message in caplog.messages) == 3
    assert (tmp_path / "run" / "report.html").exists()
    assert load_grid(tmp_path / "run" / "samples" / "iteration_000001.png").scores.tolist() == [
        [pytest.approx(math.nan, nan_ok=True)]
    ]
    assert "not these" in refuse("eval", tmp_path / "run")
    write_lines(tmp_path / "eval.txt", ["a purple square at the centre", "a red cross at the top left"])
    assert "±" in succeed("eval", tmp_path / "run").stdout


def spoil_velocity(monkeypatch, prompt):
    """The velocity of a prompt (its number) is not finite after the first step, and so are all its later states."""
    denoise = loop.denoise

    def spoilt(runner, policy, prompts, states, kind, on_host, differentiable=False):
        done = denoise(runner, policy, prompts, states, kind, on_host, differentiable)
        rows = (states.prompt == prompt).repeat_interleave(kind.fanout)
        if float(states.sigma[0]) < 1:
            done.x_next[rows] = math.nan
            done.logp[rows] = math.nan
        return done

    monkeypatch.setattr(loop, "denoise", spoilt)


@pytest.mark.parametrize(
    "engine",
    [{}, {"reuse_rollout_graph": True}, {"exact_replay": True}, {"share": False}],
    ids=["states", "graphs", "replay", "unshared"],
)
def test_a_velocity_that_is_not_finite_drops_its_prompt_and_spoils_no_other(engine, monkeypatch):
    """The gradients are those of an iteration in which a reward refuses the same prompt."""
    recipe = small_recipe(engine={"device": "cpu", **engine}, update={"kl_weight": 0.1, "updates_per_iteration": 2})

    class Refusing:
        def __call__(self, pictures, prompts):
            if TEXTS[1] in prompts:
                raise RewardError("not this one")
            return pictures.mean((1, 2, 3))

    class Bright:
        def __call__(self, pictures, prompts):
            return pictures.mean((1, 2, 3))

    monkeypatch.setattr(faults, "_WAIT", 0.0)
    gradients, lines = [], []
    for spoilt in (False, True):
        policy = Policy.load(recipe, CPU, TEXTS)
        rewards, recorder = Rewards(recipe, CPU), Recorder(recipe, policy)
        rewards.scorers = {"bright": Bright() if spoilt else Refusing()}
        if spoilt:
            spoil_velocity(monkeypatch, 1)
        lines.append(Stages(Setup(recipe), policy, recorder, rewards).run(TEXTS, 0))
        gradients.append(recorder.gradients)
    assert [line["dropped_prompts"] for line in lines] == [1, 1]
    assert lines[0]["reward"]["bright"] == pytest.approx(lines[1]["reward"]["bright"])
    for refused, spoilt in zip(*gradients, strict=True):
        assert all(torch.isfinite(gradient).all() for gradient in spoilt)
        assert any(gradient.any() for gradient in spoilt)
        assert max(float((a - b).abs().max()) for a, b in zip(refused, spoilt, strict=True)) < 1e-12


def test_a_model_that_draws_no_numbers_at_all_ends_the_run(monkeypatch):
    recipe = small_recipe()
    policy = Policy.load(recipe, CPU, TEXTS)
    updater = Updater(recipe, policy, PassRunner.of(recipe, policy))
    for prompt in range(len(TEXTS)):
        spoil_velocity(monkeypatch, prompt)
    with pytest.raises(NothingScoredError, match="not numbers"):
        Stages(Setup(recipe), policy, updater, Rewards(recipe, CPU)).run(TEXTS, 0)


@pytest.mark.parametrize(
    "credit",
    [
        {},
        {"std": "global"},
        {"std": "leaves", "baseline": "siblings"},
        {"std_shrinkage": 2.0},
        {"prune": {"kind": "extreme", "keep": 1}},
        {"fusion_beta": 0.5},
    ],
)
def test_the_credit_of_other_prompts_is_that_of_an_iteration_without_the_one_left_out(credit):
    recipe = small_recipe(
        rollout={"group_size": 4}, credit={**Credit().model_dump(), **credit}, update={"step_fraction": 0.5}
    )
    plan, _ = plan_and_coefficients(recipe)
    random = np.random.default_rng(0)
    scores, path_logp = random.random((1, 5, plan.leaves, 2)), random.random((1, 5, plan.leaves))
    scores[0, 4, 1, 0] = math.nan
    whole = assign_credit(plan, recipe.credit, scores[0], [1.0, 0.5], path_logp[0])
    alone = assign_credit(plan, recipe.credit, scores[0, :4], [1.0, 0.5], path_logp[0, :4])
    for index, edges in whole.items():
        assert not edges.trains[4].any()
        assert not edges.advantage[4].any()
        assert np.array_equal(edges.trains[:4], alone[index].trains)
        assert np.array_equal(edges.advantage[:4], alone[index].advantage)
    first = assign_credit(plan, recipe.credit, np.flip(scores[0], 0), [1.0, 0.5], np.flip(path_logp[0], 0))
    rest = assign_credit(plan, recipe.credit, np.flip(scores[0, :4], 0), [1.0, 0.5], np.flip(path_logp[0, :4], 0), 1)
    assert all(np.array_equal(first[index].trains[1:], rest[index].trains) for index in rest)


# Full disks


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("written_by", ["metrics line", "report"])
def test_a_full_disk_ends_the_run_with_a_line_and_the_same_command_goes_on(written_by, tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path)
    succeed("train", recipe, "--out", tmp_path / "whole")
    write, page = MetricsLog.write, "flowgrove.report.page.write_text"

    def second_fails(self, line):
        if line["iteration"] == 1:
            full()
        write(self, line)

    with monkeypatch.context() as patch:
        if written_by == "report":
            patch.setattr(page, full)
        else:
            patch.setattr(MetricsLog, "write", second_fails)
        assert "No space left on device; free some space" in ended("train", recipe, "--out", tmp_path / "run")
    left = checkpoints(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "latest").resolve().name == left
    assert not [path for path in (tmp_path / "run").rglob("*") if "partial" in path.name]
    succeed("train", recipe, "--out", tmp_path / "run")
    assert timeless(metrics_of(tmp_path / "run")) == timeless(metrics_of(tmp_path / "whole"))
    assert differing(weights_of(tmp_path / "run", 3), weights_of(tmp_path / "whole", 3)) == []


def test_a_full_disk_costs_grids_and_forests_and_not_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("flowgrove.report.mosaics.write_file", full)
    succeed("train", tiny_recipe(tmp_path), "--out", tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 3
    left_out = [message for message in caplog.messages if "is not written: No space left on device" in message]
    assert [sum(f"run/{folder}" in message for message in left_out) for folder in ("samples", "forests")] == [3, 2]
    assert not [path for folder in ("samples", "forests") for path in (tmp_path / "run" / folder).iterdir()]


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("a mistake")])
def test_a_grid_that_fails_for_another_reason_ends_the_run(error, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr("flowgrove.report.mosaics.write_file", fails)
    result = flowgrove("train", tiny_recipe(tmp_path), "--out", tmp_path / "run")
    assert result.exit_code == (2 if isinstance(error, OSError) else 1)


def test_a_full_disk_costs_tensorboard_and_not_the_run(tmp_path, monkeypatch, caplog, capfd):
    """Its thread has no trace printed, and its error comes with the next line."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, written = RecordWriter.write, []

    def fills(self, data):
        written.append(data)
        return write(self, data) if len(written) < 5 else full()

    monkeypatch.setattr(RecordWriter, "write", fills)
    hook = threading.excepthook
    recipe = tiny_recipe(tmp_path, run={"iterations": 4, "eval_every": 0, "log": ["jsonl", "tensorboard"]})
    succeed("train", recipe, "--out", tmp_path / "run")
    assert len(metrics_of(tmp_path / "run")) == 4
    assert [message for message in caplog.messages if message.startswith("TensorBoard gets no more metrics: No space")]
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_a_full_disk_under_the_embeddings_is_one_line_and_leaves_no_half_file(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, data={"embedding_cache": str(tmp_path / "cache")})

    def half(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("flowgrove.models.embeddings.save_file", half)
        text = refuse("train", recipe, "--out", tmp_path / "run")
    assert all(part in text for part in ("No space left", str(tmp_path / "cache"), "data.embedding_cache"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    succeed("train", recipe, "--out", tmp_path / "run")
