"""Recipes whose keys are valid one by one and mean nothing together, numbers beyond reason,
and --set in lists (issue 13).
"""

import pytest
import yaml

from flowgrove.recipe.loading import dump_recipe, load_recipe, parse_recipe
from planner_cases import recipe_content, user_error, write

REWARDS = [{"name": "jpeg_size", "weight": 2.0}, {"name": "shapes"}]
TREE = {"steps": 8, "group_size": 4, "tree": {"splits": [0, 1], "fanout": 2}, "window": {"strategy": "none"}}


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.guidance_range=[5, 3]", ["rollout.guidance_range", "25"]),
        ("rollout.guidance_range=[3, 3]", ["rollout.guidance_range"]),
        ("rollout.guidance_range=[0, 26]", ["rollout.guidance_range", "25"]),
        ("rollout.group_size=1", ["rollout.group_size", "2 or more"]),
        ("credit.prune={kind: depth, first: 25}", ["credit.prune.first", "24"]),
        ("credit.prune={kind: depth, stop: 400}", ["credit.prune.stop", "24"]),
        ("credit.prune={kind: depth, first: 0, depths: 24, stop: 23}", ["credit.prune", "depths"]),
        ("credit.prune={kind: extreme, depths: 3}", ["credit.prune", "extreme", "depths", "keep"]),
        ("credit.prune={kind: parent_top1, keep: 3}", ["credit.prune", "keep", "nothing"]),
        ("run.iterations=10000000", ["run.iterations", "1000000"]),
        ("rollout.steps=4294967296", ["rollout.steps", "1000"]),
        ("rollout.group_size=4294967296", ["rollout.group_size"]),
        ("run.eval.steps=5000", ["run.eval.steps"]),
        ("data.prompts_per_iteration=4294967296", ["data.prompts_per_iteration"]),
        ("model.height=4294967296", ["model.height"]),
        ("rollout.window.every=" + "9" * 30, ["rollout.window.every"]),
        ("update.lr=1" + "0" * 38, []),
        ("rollout.shift=1e308", ["rollout.shift", "100"]),
        ("model.lora={rank: 1, alpha: 1, targets: []}", ["model.lora.targets"]),
        ("run.out=''", ["run.out"]),
        ("model.path=''", ["model.path"]),
        ("reward.0.weight=true", ["reward.0.weight"]),
        ("reward.2.weight=1", ["reward", "0 to 1"]),
        ("reward.-1.weight=1", ["reward"]),
        ("reward.weight=1", ["reward.0.weight"]),
        ("reward.0.name.x=1", ["reward.0.name"]),
    ],
)
def test_what_can_mean_nothing_is_one_line(tmp_path, override, named):
    path = write(tmp_path / "r.yaml", recipe_content(reward=REWARDS))
    if not named:
        load_recipe(path, (override,))
        return
    text = user_error(load_recipe, path, (override,))
    assert all(part in text for part in named), text


def test_pruning_of_a_trees_every_split_is_an_error_and_of_some_is_not(tmp_path):
    path = write(tmp_path / "r.yaml", recipe_content(rollout=TREE, update={"updates_per_iteration": 2}))
    assert "prune" in user_error(load_recipe, path, ("credit.prune={kind: depth, first: 0, depths: 2, stop: 1}",))
    load_recipe(path, ("credit.prune={kind: depth, first: 0, depths: 1, stop: 1}",))


def test_a_group_of_one_may_train_on_the_divergence_alone(tmp_path):
    path = write(tmp_path / "r.yaml", recipe_content())
    assert load_recipe(path, ("rollout.group_size=1", "update.kl_weight=0.1")).rollout.group_size == 1


@pytest.mark.parametrize("mode", ["true", "max-autotune-no-cudagraphs"])
def test_a_refused_mode_of_compilation_is_told_as_it_was_written(tmp_path, mode):
    path = write(tmp_path / "r.yaml", recipe_content())
    keys = (f"engine.compile={mode}", "model.gradient_checkpointing=selective")
    told = user_error(load_recipe, path, (*keys, "engine.distributed=fsdp2"))
    assert f"engine.compile: {mode} and" in told
    assert load_recipe(path, keys).model.gradient_checkpointing == "selective"


def test_one_entry_of_a_list_can_be_set(tmp_path):
    path = write(
        tmp_path / "r.yaml", recipe_content(reward=REWARDS, rollout={"tree": {"splits": [0, 1, 2]}, "group_size": 8})
    )
    recipe = load_recipe(path, ("reward.0.weight=0.5", "reward.1={name: hpsv2}", "rollout.tree.splits.2=5"))
    assert [(reward.name, reward.weight) for reward in recipe.reward] == [("jpeg_size", 0.5), ("hpsv2", 1.0)]
    assert recipe.rollout.tree.splits == [0, 1, 5]


@pytest.mark.parametrize(
    "prune", [{"kind": "extreme", "keep": 2}, {"kind": "parent_top1"}, {"kind": "depth", "first": 3}]
)
def test_a_recipe_that_is_written_out_in_full_reads_back(prune):
    recipe = parse_recipe(recipe_content(credit={"prune": prune}))
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
