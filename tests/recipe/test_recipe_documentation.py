"""Every key of a recipe is documented where it is defined, on the command line, and on a page that is not stale."""

import inspect
import re

import pytest

from engine_cases import refuse, succeed
from flowgrove.recipe.keys import find_key, recipe_keys
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.recipe.yaml_files import read_yaml
from flowgrove.report.reference import recipe_page
from flowgrove.rewards.registry import _REWARDS
from planner_cases import recipe_content, user_error, value_at
from subprocesses import ROOT, python

KEYS = {key.name: key for key in recipe_keys()}
PAGE = ROOT / "docs" / "recipe.md"
LONGEST_SUMMARY = 120


def names_in(content, prefix=""):
    """The dotted names of a recipe that is written out in full."""
    for name, value in content.items():
        yield f"{prefix}{name}"
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield from names_in(one, f"{prefix}{name}.")


def full_recipe():
    return recipe_content(
        model={"adapter": "sd3", "path": "tiny", "lora": {"rank": 1, "alpha": 1}, "init_lora": {"path": "lora"}},
        rollout={"tree": {}, "tail": {}, "cache": {}},
        credit={"prune": {"kind": "extreme"}},
    )


def test_the_keys_are_those_of_a_recipe_that_says_everything():
    written = names_in(parse_recipe(full_recipe()).model_dump(mode="json"))
    assert sorted(KEYS) == sorted(set(written))


@pytest.mark.parametrize("name", KEYS)
def test_every_key_says_what_it_does_and_where_it_comes_from(name):
    key = KEYS[name]
    assert re.fullmatch(r"[^a-z].*\.", key.summary), "a first line that is a sentence"
    assert len(key.summary) <= LONGEST_SUMMARY
    assert key.details == "" or key.details.endswith(".")
    assert "Source:" not in key.details
    assert key.source.endswith(".") or (key.section and key.source == "")


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.default not in ("", "required")])
def test_a_default_is_written_as_a_recipe_would_say_it(name):
    shown = read_yaml(KEYS[name].default)
    if KEYS[name].section:
        assert shown is None
    else:
        content = parse_recipe(full_recipe()).model_dump(mode="json")
        assert shown == value_at(content | {"reward": content["reward"][0]}, name)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("update.clip_range", "number > 0 and ≤ 1 | [number > 0 and ≤ 1, number > 0]"),
        ("rollout.window.size", "whole number ≥ 1"),
        ("rollout.steps", "whole number from 2 to 1000"),
        ("engine.reuse_rollout_graph", "auto | true | false"),
        ("model.lora", "{rank, alpha, targets} | null"),
        ("run.log", "list of jsonl | tensorboard | wandb | swanlab | trackio | mlflow"),
    ],
)
def test_what_a_key_may_be_is_told_in_words(name, values):
    assert KEYS[name].values == values


def test_the_options_of_rewards_are_those_that_they_take():
    told = dict(re.findall(r"(\w+)(?: \(([\w, ]+)\))?: ", KEYS["reward.name"].details))
    taken = {
        name: ", ".join(option for option in inspect.signature(reward).parameters if option != "device")
        for name, reward in _REWARDS.items()
    }
    assert told == taken


# The command


def test_the_list_has_every_key_and_its_default():
    lines = succeed("recipe").stdout.splitlines()
    for key in KEYS.values():
        (line,) = (line for line in lines if line.split()[:1] == [key.name])
        assert key.default in line


def test_a_section_lists_its_own_keys():
    told = succeed("recipe", "rollout.window").stdout
    assert set(re.findall(r"^rollout\.window\.\w+", told, re.M)) == {n for n in KEYS if n.startswith("rollout.window.")}
    assert "update." not in told
    assert "rollout.tree.splits" not in succeed("recipe", "rollout").stdout


@pytest.mark.parametrize("name", ["update.clip_range", "rollout.window.strategy", "reward.0.weight"])
def test_one_key_is_told_in_full(name):
    key, told = find_key(name)[0], " ".join(succeed("recipe", name).stdout.split())
    for part in (key.name, key.default, key.values, key.summary, key.details, key.source):
        assert " ".join(part.split()) in told


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rollout.windw", "rollout.window"),
        ("update.clip_rnge", "update.clip_range"),
        ("clip_range", "update.clip_range"),
        ("updates.learning_rate_schedule", "update.lr_schedule"),
        ("reward.0.weigth", "reward.weight"),
    ],
)
def test_an_unknown_key_is_one_line_that_names_the_nearest(typed, meant):
    assert refuse("recipe", typed) == f"error: unknown key {typed}: did you mean {meant}?"


def test_a_key_that_resembles_nothing_is_told_the_sections():
    assert all(section in user_error(find_key, "qqqq") for section in Recipe.model_fields)


def test_the_page_is_what_the_command_writes():
    assert PAGE.read_text(encoding="utf-8") == succeed("recipe", "--markdown").stdout, "stale: run `make docs`"


def test_every_row_of_the_page_has_the_cells_of_its_table():
    rows = [re.sub(r"\\\|", "", line) for line in recipe_page().splitlines() if line.startswith("|")]
    assert len(rows) > len(KEYS) - len(Recipe.model_fields)
    assert {row.count("|") for row in rows} == {5}


@pytest.mark.parametrize("command", ["recipe", "metrics"])
def test_it_starts_without_torch(command):
    program = f"import sys; sys.argv = ['flowgrove', {command!r}]\nfrom flowgrove.cli import app\n"
    told = python("-c", program + "app(standalone_mode=False)\nprint('torch' in sys.modules)").stdout
    assert told.splitlines()[-1] == "False"
