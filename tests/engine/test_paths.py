"""One rule for the paths that a recipe and a command line say (issue 13)."""

import pytest

from engine_cases import refuse, tiny_recipe
from flowgrove.errors import UserError, one_line
from flowgrove.recipe.loading import load_recipe
from planner_cases import recipe_content, user_error, write


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home", "recipes", "work"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def recipe_in(folder, **said):
    data = {
        "prompts": said.get("prompts", "p.txt"),
        "eval_prompts": said.get("eval_prompts"),
        "embedding_cache": said.get("cache", "auto"),
    }
    reward = {"name": "python", "file": said.get("file", "r.py")}
    model = {"adapter": "sd3", "path": said.get("model", "tiny")}
    return write(
        folder / "r.yaml",
        recipe_content(model=model, data=data, reward=[reward], run={"out": said.get("out", "runs/NAME")}),
    )


SAID = {
    "model": lambda recipe: recipe.model.path,
    "prompts": lambda recipe: recipe.data.prompts,
    "eval_prompts": lambda recipe: recipe.data.eval_prompts,
    "file": lambda recipe: recipe.reward[0].model_extra["file"],
}


@pytest.mark.parametrize("key", SAID)
def test_what_is_read_is_sought_in_the_home_beside_the_recipe_and_in_the_working_folder(home, tmp_path, key):
    """Whatever the folder from which the command is given, a file beside the recipe wins,
    and what is found is absolute.
    """
    found = SAID[key]
    for place, said in ((home, "~/x/thing"), (tmp_path / "work", "x/thing"), (tmp_path / "recipes", "x/thing")):
        write(place / "x" / "thing", "")
        assert found(load_recipe(recipe_in(tmp_path / "recipes", **{key: said}))) == str(place / "x" / "thing")


def test_what_is_written_is_relative_to_the_working_folder_and_knows_the_home(home, tmp_path):
    (tmp_path / "recipes" / "cache").mkdir()
    recipe = load_recipe(recipe_in(tmp_path / "recipes", out="~/runs/NAME", cache="cache"))
    assert (recipe.run.out, recipe.data.embedding_cache) == (str(home / "runs" / "r"), "cache")
    assert load_recipe(recipe_in(tmp_path / "recipes", cache="~/cache")).data.embedding_cache == str(home / "cache")
    assert load_recipe(recipe_in(tmp_path / "recipes")).run.out == "runs/r"


def test_a_folder_named_tiny_is_not_the_embedded_pipeline(home, tmp_path):
    (tmp_path / "recipes" / "tiny").mkdir()
    assert load_recipe(recipe_in(tmp_path / "recipes")).model.path == "tiny"
    assert load_recipe(recipe_in(tmp_path / "recipes", model="./tiny")).model.path == str(tmp_path / "recipes" / "tiny")


def test_a_repository_that_is_no_folder_keeps_its_name(home, tmp_path):
    assert load_recipe(recipe_in(tmp_path / "recipes", model="owner/name")).model.path == "owner/name"


@pytest.mark.parametrize("path", ["~nobody-here/x", "a\0b"])
@pytest.mark.parametrize("key", [*SAID, "out", "cache"])
def test_what_can_be_no_path_is_one_line_that_names_the_key(home, tmp_path, key, path):
    text = user_error(load_recipe, recipe_in(tmp_path / "recipes", **{key: path}))
    assert {"model": "model.path", "file": "reward.0.file", "out": "run.out", "cache": "data.embedding_cache"}.get(
        key, f"data.{key}"
    ) in text


def test_loops_of_links_and_names_too_long_are_not_there(home, tmp_path):
    (tmp_path / "recipes" / "loop").symlink_to("loop")
    for said in ("loop", "x" * 5000):
        assert load_recipe(recipe_in(tmp_path / "recipes", prompts=said)).data.prompts == said


def test_the_command_line_knows_the_home(home, tmp_path):
    tiny_recipe(home / "mine")
    assert "gone.txt" in refuse("sample", "~/mine/mine.yaml", "--prompts", "~/gone.txt", "--out", tmp_path / "out")
    assert "nobody-here" in refuse("plan", "~nobody-here/mine.yaml")


def test_errors_are_one_line_whatever_they_quote():
    text = str(UserError("a\nb\u2028c\x1b[31m\ud800\x85d\0"))
    assert text == "a b c\\x1b[31m\\ud800 d\\x00"
    assert len(one_line("x" * 10**6)) == 2000
