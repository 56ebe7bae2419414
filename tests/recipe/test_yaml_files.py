"""Recipes as YAML: the rules of YAML 1.2, no key twice, nothing endless,
and one line for what is no recipe (issue 13).
"""

import os
import time

import pytest
import yaml

from flowgrove.recipe.loading import dump_recipe, load_recipe, parse_recipe
from flowgrove.recipe.yaml_files import read_yaml
from planner_cases import recipe_content, user_error, write

BASE = "model: {adapter: sd3, path: tiny}\ndata: {prompts: p.txt}\nreward: [{name: shapes}]\n"


def refused(folder, text):
    return user_error(load_recipe, write(folder / "r.yaml", text))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("+3", 3), ("1:30", "1:30"), ("yes", "yes"), ("No", "No"),
        ("on", "on"), ("1_000", "1_000"), ("TRUE", True), ("2026-02-30", "2026-02-30"), ("1e-5", 1e-5), (".5", 0.5),
        ("5.", 5.0), ("-.inf", float("-inf")), ("~", None), ("", None), ("'010'", "010"), ("=", "="),
        ("!!str 12", "12"), ('"\\ud83d\\ude00"', "😀"), ("{<<: &x {a: 1, b: 2}, b: 3}", {"a": 1, "b": 3}),
        ("{<<: [{a: 1}, {a: 2, b: 2}]}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_values_are_those_of_yaml_1_2(text, value):
    found = read_yaml(text)
    assert (found, type(found)) == (value, type(value))


def test_an_alias_is_a_value_of_its_own():
    found = read_yaml("a: &x {b: 1}\nc: *x\n")
    found["c"]["b"] = 2
    assert found == {"a": {"b": 1}, "c": {"b": 2}}


@pytest.mark.parametrize(
    "setting",
    ["run.seed=yes", "run.seed=true", "run.seed=1:30", "run.iterations=on", "update.lr=true", "model.height=false"],
)
def test_words_and_times_are_no_numbers(tmp_path, setting):
    key = setting.split("=")[0]
    assert key in user_error(load_recipe, write(tmp_path / "r.yaml", BASE), (setting,))


def test_010_is_ten(tmp_path):
    assert load_recipe(write(tmp_path / "r.yaml", BASE), ("run.seed=010",)).run.seed == 10


TWICE = ["update: {lr: 1e-4}\nupdate: {warmup: 3}\n", "update: {lr: 1e-4, lr: 1e-5}\n", '"data": {prompts: q.txt}\n']


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_stands_twice_is_an_error_that_names_it_and_the_line(tmp_path, text):
    found = refused(tmp_path, BASE + text)
    assert "second time" in found
    assert any(f"key {key} " in found for key in ("update", "lr", "data"))
    assert "line 4" in found or "line 5" in found


TENFOLD = "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{', '.join([f'*{chr(97 + level)}'] * 10)}]\n" for level in range(9)
)
MERGES = "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} {{<<: [{', '.join([f'*{chr(97 + level)}'] * 10)}]}}\n" for level in range(9)
)
BOMBS = {
    "aliases": BASE + "a: &a [x, x]\n" + TENFOLD,
    "merge keys": BASE + "a: &a {x: 1}\n" + MERGES,
    "itself": BASE.replace("{name: shapes}", "&r {name: shapes, options: *r}"),
    "depth": BASE + "x: " + "[" * 100_000,
    "block depth": BASE + "x:\n" + "- " * 3000 + "1\n",
    "values": BASE + "x: [" + "1," * 30_000 + "]\n",
    "digits": BASE + "x: " + "9" * 5000,
    "size": BASE + "#" * 300_000,
}
WRONG_TAGS = [
    "!!timestamp x",
    "!!bool x",
    "!!int x",
    "!!float x",
    "!!null x",
    "!!binary x",
    "!!set {a}",
    "!!python/name:os.system",
    "!mine 3",
    "!!map 3",
]


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_once_in_one_line(tmp_path, name):
    start = time.monotonic()
    assert "r.yaml" in refused(tmp_path, BOMBS[name])
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("value", [*WRONG_TAGS, '"\\ud800"', "*unknown", "{[a]: b}", "{1: 2}", "&a &b c"])
def test_values_that_cannot_be_read_are_one_line(tmp_path, value):
    assert "is not YAML" in refused(tmp_path, BASE + f"x: {value}\n")


def test_a_chain_of_thousands_of_bases_is_one_line(tmp_path):
    for number in range(3000):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    assert "chain" in user_error(load_recipe, tmp_path / "0.yaml")


def test_pipes_devices_loops_and_huge_files_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("pipe.yaml", "loop.yaml", "huge.yaml", "/dev/zero", "nul\0.yaml", "~nobody-here/x.yaml", "x" * 5000):
        user_error(load_recipe, tmp_path / name if not name.startswith("~") else name)
        if "\0" not in name:
            user_error(load_recipe, write(tmp_path / "r.yaml", f"extends: {name}\n"))
    assert "NUL" in refused(tmp_path, 'extends: "a\\0b"\n')


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "0o17",
        "010",
        "yes",
        "1:30",
        "null",
        "~",
        "true",
        ".inf",
        "0x1f",
        "2026-01-01",
        "1_0",
        "=",
        "<<",
        "größe: #1",
        "😀",
    ],
)
def test_text_that_looks_like_something_else_is_dumped_as_text(text):
    recipe = parse_recipe(recipe_content(run={"out": text}))
    assert parse_recipe(read_yaml(dump_recipe(recipe))) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["run"]["out"] == text
