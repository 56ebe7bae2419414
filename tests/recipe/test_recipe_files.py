"""Recipe files: `extends`, prompt paths, run.out, --set, and files that are no recipes (DESIGN §3.2 and §3.3)."""

from pathlib import Path

import pytest
import yaml

from flowgrove.recipe.loading import dump_recipe, load_recipe
from planner_cases import recipe_content, user_error, value_at, write


@pytest.fixture
def recipe_file(tmp_path):
    return write(tmp_path / "mine.yaml", recipe_content())


def test_extends_merges_sections_key_by_key_and_replaces_lists_and_nulls(tmp_path):
    rollout = {
        "steps": 20,
        "tree": {"splits": [0, 3], "fanout": 4},
        "window": {"size": 3, "every": 7},
        "tail": {"compress": 0.5},
    }
    write(
        tmp_path / "base.yaml",
        recipe_content(rollout=rollout, reward=[{"name": "hpsv2", "weight": 2.0}, {"name": "pickscore"}]),
    )
    change = {
        "extends": "base.yaml",
        "rollout": {"tree": {"splits": [1, 2]}, "window": {"every": 9}, "tail": None},
        "reward": [{"name": "shapes"}],
    }
    recipe = load_recipe(write(tmp_path / "child.yaml", change))
    assert (recipe.rollout.steps, recipe.rollout.tree.splits, recipe.rollout.tree.fanout) == (20, [1, 2], 4)
    assert (recipe.rollout.window.size, recipe.rollout.window.every, recipe.rollout.tail) == (3, 9, None)
    assert [reward.name for reward in recipe.reward] == ["shapes"]


def test_extends_chains_and_is_relative_to_the_file_that_says_it(tmp_path, monkeypatch):
    write(tmp_path / "base.yaml", recipe_content(run={"seed": 1, "iterations": 1, "keep_last": 1}))
    write(tmp_path / "models" / "middle.yaml", {"extends": "../base.yaml", "run": {"iterations": 2, "keep_last": 2}})
    top = write(
        tmp_path / "variants" / "deep" / "top.yaml", {"extends": "../../models/middle.yaml", "run": {"keep_last": 3}}
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (top, Path("../variants/deep/top.yaml")):
        run = load_recipe(path).run
        assert (run.seed, run.iterations, run.keep_last, run.out) == (1, 2, 3, "runs/top")


def test_a_section_may_follow_where_the_base_says_null(tmp_path):
    write(tmp_path / "base.yaml", recipe_content(rollout={"tail": None}))
    child = write(tmp_path / "child.yaml", {"extends": "base.yaml", "rollout": {"tail": {"compress": 0.2}}})
    assert load_recipe(child).rollout.tail.compress == 0.2


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_extends_in_a_circle_is_an_error(tmp_path, names):
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        write(tmp_path / f"{name}.yaml", recipe_content(extends=f"{following}.yaml"))
    text = user_error(load_recipe, tmp_path / "a.yaml")
    assert "extends" in text
    assert all(f"{name}.yaml" in text for name in names)


def test_extending_one_base_on_two_paths_is_no_circle(tmp_path):
    write(tmp_path / "base.yaml", recipe_content())
    write(tmp_path / "middle.yaml", {"extends": "base.yaml", "run": {"seed": 5}})
    assert load_recipe(write(tmp_path / "a.yaml", {"extends": "middle.yaml"})).run.seed == 5
    assert load_recipe(write(tmp_path / "b.yaml", {"extends": "base.yaml"})).run.seed == 42


def test_extending_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path):
    assert "nowhere.yaml" in user_error(load_recipe, write(tmp_path / "a.yaml", recipe_content(extends="nowhere.yaml")))


@pytest.mark.parametrize("base", [["a.yaml", "b.yaml"], 5, {"file": "a.yaml"}])
def test_extends_takes_one_file_name(tmp_path, base):
    assert "extends" in user_error(load_recipe, write(tmp_path / "a.yaml", recipe_content(extends=base)))


def test_a_mistake_in_the_base_is_found_through_the_child(tmp_path):
    write(tmp_path / "base.yaml", recipe_content(run={"sed": 1}))
    text = user_error(load_recipe, write(tmp_path / "child.yaml", {"extends": "base.yaml"}))
    assert "run.sed" in text
    assert "seed" in text.replace("run.sed", "")


@pytest.mark.parametrize("key", ["prompts", "eval_prompts"])
def test_prompts_are_sought_beside_the_recipe_first_then_in_the_working_folder(tmp_path, monkeypatch, key):
    recipe = write(tmp_path / "recipes" / "r.yaml", recipe_content(data={"prompts": "both.txt", key: "lists/mine.txt"}))
    there = write(tmp_path / "work" / "lists" / "mine.txt", "working folder")
    monkeypatch.chdir(tmp_path / "work")
    assert Path(getattr(load_recipe(recipe).data, key)).resolve() == there
    beside = write(tmp_path / "recipes" / "lists" / "mine.txt", "beside the recipe")
    assert Path(getattr(load_recipe(recipe).data, key)).resolve() == beside


def test_prompts_of_a_base_in_another_folder_are_found_beside_it(tmp_path, monkeypatch):
    prompts = write(tmp_path / "recipes" / "prompts.txt", "a red circle")
    write(tmp_path / "recipes" / "base.yaml", recipe_content())
    child = write(tmp_path / "mine" / "child.yaml", {"extends": "../recipes/base.yaml"})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert Path(load_recipe(child).data.prompts).resolve() == prompts


def test_absolute_prompt_paths_stay(tmp_path):
    prompts = write(tmp_path / "far" / "p.txt", "a red circle")
    recipe = write(tmp_path / "recipes" / "r.yaml", recipe_content(data={"prompts": str(prompts)}))
    assert Path(load_recipe(recipe).data.prompts) == prompts


def test_prompts_set_on_the_command_line_are_relative_to_the_recipe_too(tmp_path, monkeypatch):
    recipe = write(tmp_path / "recipes" / "r.yaml", recipe_content())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    in_the_working_folder = write(tmp_path / "work" / "here.txt", "a red circle")
    assert Path(load_recipe(recipe, ("data.prompts=here.txt",)).data.prompts).resolve() == in_the_working_folder
    beside = write(tmp_path / "recipes" / "there.txt", "a blue square")
    assert Path(load_recipe(recipe, ("data.prompts=there.txt",)).data.prompts).resolve() == beside


def test_name_in_run_out_is_the_file_name_of_the_recipe(tmp_path):
    write(tmp_path / "base.yaml", recipe_content())
    child = write(tmp_path / "mix.v2.yaml", {"extends": "base.yaml"})
    assert load_recipe(child).run.out == "runs/mix.v2"
    assert load_recipe(child, ("run.out=/data/NAME",)).run.out == "/data/mix.v2"
    assert load_recipe(child, ("run.out=here",)).run.out == "here"


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("run.seed=3", "run.seed", 3),
        ("update.lr=3e-4", "update.lr", 3e-4),
        ("rollout.window.range=[0, 5]", "rollout.window.range", [0, 5]),
        ("rollout.window.wrap=false", "rollout.window.wrap", False),
        ("rollout.shift=null", "rollout.shift", None),
        ("rollout.tree.fanout=3", "rollout.tree.fanout", 3),
        ("rollout.tail={compress: 0.2}", "rollout.tail.compress", 0.2),
        ("run.out=runs/a=b", "run.out", "runs/a=b"),
        ("model.path=/models/SD 3.5", "model.path", "/models/SD 3.5"),
        ("reward=[{name: hpsv2}]", "reward", [{"name": "hpsv2", "label": None, "weight": 1.0}]),
    ],
)
def test_overrides_are_yaml_values_at_dotted_keys(recipe_file, override, key, expected):
    assert value_at(yaml.safe_load(dump_recipe(load_recipe(recipe_file, (override,)))), key) == expected


def test_overrides_win_over_the_file_and_its_base_and_the_last_one_wins(tmp_path):
    write(tmp_path / "base.yaml", recipe_content(run={"seed": 1, "iterations": 1}))
    child = write(tmp_path / "child.yaml", {"extends": "base.yaml", "run": {"seed": 2, "keep_last": 9}})
    run = load_recipe(child, ("run.seed=3", "run.iterations=8", "run.seed=4")).run
    assert (run.seed, run.iterations, run.keep_last) == (4, 8, 9)


@pytest.mark.parametrize(
    "override", ["run.seed", "=3", "run.seed:3", "run.seed 3", "", "run.seed=[", "run.=3", ".seed=3", "run..seed=3"]
)
def test_a_malformed_override_is_an_error_that_shows_it(recipe_file, override):
    text = user_error(load_recipe, recipe_file, (override,))
    assert override.split("=")[0] in text


def test_an_override_below_a_number_is_an_error_that_names_the_number(recipe_file):
    assert "run.seed" in user_error(load_recipe, recipe_file, ("run.seed.low=3",))


def test_an_unknown_override_names_the_nearest_key(recipe_file):
    text = user_error(load_recipe, recipe_file, ("run.sed=3",))
    assert "run.sed" in text
    assert "seed" in text.replace("run.sed", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: {adapter: sd3, path: \xff\xfe}", "UTF-8"),
        (b"model: {adapter: sd3\ndata: [", "YAML"),
        (b"model:\n\tadapter: sd3\n", "YAML"),
        (b"model: \x00", "YAML"),
        (b"run: {out: !!timestamp 2026-02-30}\n", "YAML"),
        (b"- model\n- data\n", "mapping"),
        (b"just words", "mapping"),
        (b"", "mapping"),
    ],
    ids=["not UTF-8", "open bracket", "tab", "control character", "impossible date", "list", "words", "empty"],
)
def test_a_file_that_is_no_recipe_is_an_error_that_names_file_and_reason(tmp_path, content, said):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    text = user_error(load_recipe, path)
    assert "broken.yaml" in text
    assert said in text


def test_a_recipe_that_is_not_there_or_is_a_folder_is_an_error_that_names_it(tmp_path):
    assert "absent.yaml" in user_error(load_recipe, tmp_path / "absent.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml" in user_error(load_recipe, tmp_path / "folder.yaml")
