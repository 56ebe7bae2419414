"""What goes wrong inside an iteration, by the rows of docs/faults.md: what is left out, what is counted, what ends the
run and what is saved then.
"""

import math

import numpy as np
import pytest
import torch
from test_ranks import CASES, assert_same, last, written

from engine_cases import checkpoints, flowgrove, metrics_of, succeed, tiny_recipe, weights_of
from flowgrove.credit import assign_credit
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.rollout.loop import rollout
from flowgrove.run.summaries import update_summary
from flowgrove.update.optimizers import state_tensors
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from host_reads import count_host_reads
from policy_cases import CPU, TEXTS, plan_and_coefficients, small_recipe
from torchrun import torchrun

# One number of a gradient is not finite, on the last rank, in some updates.
POISON = """
import os
from flowgrove.update.updater import Updater

whole = Updater._gradient

def poisoned(self, passes, number):
    stats = whole(self, passes, number)
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if last and (passes.parts[0].forest.plan.iteration, number) in {updates}:
        self.parameters[3].grad.view(-1)[0] = float("{value}")
    return stats

Updater._gradient = poisoned
"""
COMMAND = "from flowgrove.cli import app\n\napp()\n"


def poison(monkeypatch, updates, value="nan"):
    """Inside this process."""
    monkeypatch.setattr(Updater, "_gradient", Updater._gradient)  # put back afterwards
    exec(POISON.format(updates=set(updates), value=value), {})


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


def test_an_update_that_one_rank_spoils_is_skipped_on_all(tmp_path, monkeypatch):
    recipe = written(tmp_path, **CASES["window, LoRA, KL"])
    spoil = POISON.format(updates={(1, 0)}, value="nan")
    (tmp_path / "spoilt.py").write_text(spoil + COMMAND)
    poison(monkeypatch, {(1, 0)})
    monkeypatch.setenv("WORLD_SIZE", "1")
    succeed("train", recipe, "--out", tmp_path / "one")
    options = ("--set", "engine.distributed=ddp", "--out", tmp_path / "several")
    torchrun(2, tmp_path / "spoilt.py", "train", recipe, *options, output=tmp_path / "log")
    assert_same(tmp_path / "several", tmp_path / "one")
    assert [line["skipped_updates"] for line in metrics_of(tmp_path / "several")] == [0, 1, 0]
    steps = {float(tensor) for key, tensor in last(tmp_path / "several", "optimizer").items() if key.endswith("/step")}
    assert steps == {5.0}
