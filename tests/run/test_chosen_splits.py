"""A run that chooses its splits (`rollout.tree.splits: auto`): probing, choice, and both across a resume."""

import json
import shutil

import pytest
import torch

from engine_cases import (
    checkpoints,
    flowgrove,
    metrics_of,
    refuse,
    strict_json,
    succeed,
    timeless,
    tiny_recipe,
    weights_of,
)
from flowgrove.compare.goal import planned_iterations
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.content import run_content
from flowgrove.report.series import unshared_passes
from flowgrove.run.metric_keys import METRICS
from flowgrove.setup import Setup

ROLLOUT = {
    "steps": 5,
    "group_size": 4,
    "window": {"strategy": "none"},
    "tree": {"splits": "auto", "probe": 3, "forwards": 15, "sibling_correlation": 0.0},
    "tail": {"compress": 0.5},
}
RUN = {"iterations": 5, "checkpoint_every": 1, "eval_every": 0, "forest_every": 4, "keep_last": 9}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("splits"), rollout=ROLLOUT, run=RUN)


@pytest.fixture(scope="module")
def said(recipe):
    """A whole run, and what it has said."""
    return succeed("train", recipe, "--out", recipe.parent / "run")


@pytest.fixture(scope="module")
def run(recipe, said):
    return recipe.parent / "run"


def test_steps_take_turns_and_what_is_chosen_stays(recipe, run):
    lines, search = metrics_of(run), Setup(load_recipe(recipe)).split_search
    assert [tuple(line["tree_splits"]) for line in lines[:3]] == list(search.probing)
    (chosen,) = [line["chosen_splits"] for line in lines if "chosen_splits" in line]
    assert "chosen_splits" in lines[2]
    assert [line["tree_splits"] for line in lines[3:]] == [chosen, chosen]
    assert search.fits(tuple(chosen))
    assert all(line["rollout_forwards"] == 2 * search.forwards(tuple(line["tree_splits"])) for line in lines)
    assert max(line["rollout_forwards"] for line in lines) <= 2 * 15
    assert {step for line in lines for step in line["tree_splits"]} == {0, 1, 2, 3}
    assert ["split_evidence" in line for line in lines] == [True, True, True, False, False]
    evidence = {int(step): share for step, share in lines[2]["split_evidence"].items()}
    weights = {step: max(0, round(share * 10**12)) for step, share in evidence.items()}
    assert list(evidence) == [0, 1, 2, 3]
    assert tuple(chosen) == search.best(weights)
    for line in lines:  # only splits are stochastic, and all of them train
        assert {int(step) for step in line["advantage_by_step"]} <= set(line["tree_splits"])


def test_every_key_that_it_writes_is_explained(run):
    keys = {key for line in metrics_of(run) for key in line}
    assert keys <= {metric.key for metric in METRICS}
    assert {"tree_splits", "split_evidence", "chosen_splits"} <= keys


def test_the_choice_is_said_once(run, said):
    (line,) = [line for line in said.stderr.splitlines() + said.stdout.splitlines() if "rollout.tree.splits" in line]
    assert ", ".join(str(step) for step in metrics_of(run)[2]["chosen_splits"][:1]) in line
    assert "of 15 forwards a prompt" in line


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_it_is_resumed_to_the_last_bit_inside_and_after_the_probing(recipe, run, tmp_path, cut):
    part = tmp_path / "run"
    shutil.copytree(run, part, symlinks=True, ignore=shutil.ignore_patterns("latest", "report.html", "forests"))
    for name in checkpoints(part):
        if int(name.removeprefix("step_")) > cut:
            shutil.rmtree(part / "checkpoints" / name)
    (part / "latest").symlink_to(f"checkpoints/step_{cut:06d}")
    succeed("train", recipe, "--out", part)
    assert timeless(metrics_of(part)) == timeless(metrics_of(run))
    found, expected = weights_of(part, 5), weights_of(run, 5)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    left, right = (json.loads((one / "checkpoints/step_000005/state.json").read_text()) for one in (part, run))
    assert left["splits"] == right["splits"]


def test_a_plan_says_that_splits_will_be_chosen_and_that_of_the_run_which(recipe, run):
    chosen = metrics_of(run)[2]["chosen_splits"]
    before = succeed("plan", recipe).stdout
    assert "splits: chosen after 3 iterations, within 15 forwards a prompt; the tree shown probes" in before
    assert "in place of what will be chosen" in succeed("plan", recipe, "--iteration", "3").stdout
    after = succeed("plan", run / "recipe.yaml", "--iteration", "3").stdout
    assert "share by step: 0 " in after
    assert "splits: the tree splits at the steps " in after
    told = strict_json(succeed("plan", run / "recipe.yaml", "--iteration", "3", "--json").stdout)
    assert told["splits"]["chosen"] == chosen == [step["index"] for step in told["steps"] if step["fanout"] > 1]
    assert list(told["splits"]["evidence"]) == ["0", "1", "2", "3"]
    unknown = strict_json(succeed("plan", recipe, "--json").stdout)["splits"]
    assert unknown == {"probe": 3, "forwards": 15, "chosen": None, "evidence": {}}


def test_lines_of_another_tree_choose_nothing(recipe, run):
    told = strict_json(succeed("plan", run / "recipe.yaml", "--json", "--set", "rollout.group_size=8").stdout)
    assert told["splits"]["chosen"] is None


def test_the_report_tells_of_the_choice_and_counts_by_it(recipe, run):
    settings, lines = load_recipe(run / "recipe.yaml"), metrics_of(run)
    (fact,) = [fact for fact in run_content(settings, run)["facts"] if fact[0] == "Splits"]
    assert fact[1] == ", ".join(map(str, lines[2]["chosen_splits"]))
    assert "of 15 forwards a prompt" in fact[2]
    plans = [Setup(settings).plan(line["iteration"], tuple(line["tree_splits"])) for line in lines]
    assert unshared_passes(settings, lines) == [
        (2 * plan.counts.unshared_rollout_forwards, 2 * plan.counts.unshared_train_passes) for plan in plans
    ]
    assert len(list((run / "forests").glob("*.json*"))) >= 1


def test_a_report_of_a_run_that_still_probes_says_so(recipe, run, tmp_path):
    shutil.copy(run / "recipe.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(True)[:2]))
    (fact,) = [fact for fact in run_content(load_recipe(recipe), tmp_path)["facts"] if fact[0] == "Splits"]
    assert fact[1] == "not chosen yet"
    assert "share by step" in succeed("plan", tmp_path / "recipe.yaml").stdout


def test_a_run_with_given_splits_cannot_go_on_with_open_ones(recipe, tmp_path):
    run = tmp_path / "run"
    succeed("train", recipe, "--out", run, "--set", "rollout.tree={splits: [0, 2]}", "--set", "run.iterations=1")
    result = flowgrove("train", recipe, "--out", run, "--force")
    assert result.exit_code == 2
    *_, line = result.stderr.splitlines()
    assert "error: rollout.tree.splits is auto, and the checkpoint of 1 iterations was not written with it" in line


def test_the_cost_of_a_comparison_counts_probing_trees_and_then_the_budget(recipe):
    setup = Setup(load_recipe(recipe))
    search = setup.split_search
    trees = [*search.probing, *[search.dear] * 4]
    trained = 3 * setup.first_plan.counts.train_passes
    costs = [2 * (search.forwards(splits) + trained) for splits in trees]
    for count in range(1, 8):
        assert planned_iterations(setup, sum(costs[:count])) == count


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("rollout.window={strategy: frozen, size: 2}", "write rollout.window.strategy: none"),
        ("rollout.window={strategy: all}", "write rollout.window.strategy: none"),
        ("credit.prune={kind: depth, depths: 1, first: 1, stop: 2}", "does not go with credit.prune.kind: depth"),
        ("rollout.group_size=6", "rollout.group_size is 6"),
        ("rollout.tree.forwards=6", "rollout.tree.forwards is 6"),
        ("rollout.tree={splits: [0, 1], forwards: 9}", "forwards is the budget of splits: auto"),
        ("rollout.tree={splits: never}", "rollout.tree.splits"),
    ],
)
def test_what_cannot_be_right_is_one_line(recipe, change, wanted):
    assert wanted in refuse("plan", recipe, "--set", change)
