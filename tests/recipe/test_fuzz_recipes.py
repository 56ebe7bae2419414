"""Hostile recipes: every one is a recipe that can be planned and written out again, or one line (issue 13)."""

import copy
import os
import random
from pathlib import Path

import pytest
import yaml

from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import shifted_sigmas
from flowgrove.recipe.loading import dump_recipe, load_recipe, parse_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.recipe.yaml_files import read_yaml
from flowgrove.report.plan_view import plan_json
from hostile import NASTY, damaged, outcome

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FIRST, ALL = 160, 2400
PLAIN = ("0", "1", "9", "-", ".", " ", "a", "5", "true", "null", "[]", "e-3", "# ")
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 25, 1000, 1001, 4096, 2**31, 2**32, 2**63, 2**64, 10**39, 0.0, -0.5, 0.5, 1.0,
    1e-5, 1e308, float("inf"), float("nan"), "", " ", "auto", "none", "tiny", "NAME", "~", "~nobody-here/x", "a/b",
    "/dev/zero", "x" * 5000, "a\0b", "\x1b[31m", "yes", "1:30", "010", "depth", [], [0], [0, 1], [1, 0], [0, 3, 6, 9],
    [True, 2], [[1, 2]], [{}], {}, {"kind": "depth"}, {"kind": "extreme", "depths": 2}, {"name": "shapes"},
    [{"name": "shapes"}], {"a": {"b": [1, {"c": 2}]}},
)  # fmt: skip


def keys_of(model, prefix=()):
    """Every dotted key of a recipe."""
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                yield from keys_of(kind, (*prefix, name))


KEYS = list(keys_of(Recipe))


def whole(path):
    """A recipe of the repository as one mapping."""
    return load_recipe(path).model_dump(mode="json")


def with_values(draw, content):
    for _ in range(draw.choice((1, 1, 2, 4))):
        *sections, last = draw.choice(KEYS)
        place = content
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        now = place.get(last)
        if isinstance(now, int | float) and draw.random() < 0.6:
            place[last] = draw.choice((now + 1, now * 2, now / 2, now * 1000, -now, now - 1, 1, str(now)))
        else:
            place[last] = draw.choice(VALUES)
    return content


def grammar(draw, depth=0):
    """Text that looks like YAML."""
    key = draw.choice((*(key[-1] for key in KEYS), "extends", "<<", *NASTY))
    match draw.randrange(5 if depth < 6 else 2):
        case 0:
            return f"{draw.choice((*NASTY, 'x', '3', '1e-5'))}"
        case 1:
            return f"&{draw.choice('abc')} {draw.choice(('x', '[1]', '{a: 1}', '*a'))}"
        case 2:
            return (
                "["
                + ", ".join(grammar(draw, depth + 1) for _ in range(draw.randrange(5)))
                + draw.choice(("]", "]", ""))
            )
        case 3:
            return f"{{{key}: {grammar(draw, depth + 1)}, {key}x: *{draw.choice('abc')}}}"
        case _:
            return "".join(f"{draw.choice(KEYS)[0]}: {grammar(draw, depth + 1)}\n" for _ in range(draw.randint(1, 4)))


def levels(first, form, count):
    """Values of which each stands for nine of the one before."""
    lines = [f"a0: &a0 {first}\n"]
    for number in range(count):
        inner = ", ".join([f"*a{number}"] * 9)
        lines.append(f"a{number + 1}: &a{number + 1} {form.replace('X', inner)}\n")
    return "".join(lines)


def bomb(draw):
    """Small files that mean much."""
    size, name = draw.choice((3, 30, 300, 30_000)), draw.choice(KEYS)[-1]
    few, word = min(size, 3000), "x" * size
    return draw.choice((
        "[" * size, "{a: " * size, "- " * few + "1", "? " * few, f"{name}: [{'x, ' * size}]", f"{name}: {'9' * size}",
        f"{name}: !!int {'9' * size}", f"{name}: &a [*a]", f"a: &a {{x: *a}}\n{name}: {{<<: *a}}",
        levels("{x: 1}", "{<<: [X]}", min(size, 40)), levels("[x]", "[X]", min(size, 40)), f"{name}: 1\n" * size,
        f"{word}: 1", "#" * size, "\n" * size, f"{name}: !!timestamp x", f"{name}: !!bool {name}",
        f"{name}: !!python/object/apply:os.system [true]", f"%YAML {size}.1\n---\n{name}: 1", f"{name}: |{size}\n  x",
        "extends: r.yaml", "extends: [r.yaml]", "extends: .", "extends: pipe", "extends: loop", "extends: huge",
        "extends: /dev/zero", "extends: ''", f"extends: {'x/' * size}y",
    ))  # fmt: skip


def overrides(draw):
    def part():
        known = ("reward.0.weight", "reward.9.name", "reward.x", "rollout.tree.splits.0", "a..b", "", *NASTY[:20])
        return draw.choice((".".join(draw.choice(KEYS)), draw.choice(known)))

    def value():
        return str(draw.choice((*VALUES, *NASTY[:-8])))

    return tuple(f"{part()}={value()}" for _ in range(draw.randrange(1, 4)))


def case(number):
    """(bytes of the recipe, overrides) of a number."""
    draw = random.Random(f"recipes/{number}")
    source = draw.choice(RECIPES)
    match number % 6:
        case 0:
            text = draw.choice((WHOLE[source], source.read_bytes()))
            return damaged(draw, text, draw.choice((NASTY[:8], PLAIN))), ()
        case 1:
            return grammar(draw, draw.randrange(3)).encode("utf-8", "surrogatepass"), ()
        case 2:
            return bomb(draw).encode(), ()
        case 3:
            return WHOLE[source], overrides(draw)
        case _:
            return yaml.safe_dump(with_values(draw, copy.deepcopy(read_yaml(WHOLE[source].decode())))).encode(), ()


WHOLE = {path: yaml.safe_dump(whole(path)).encode() for path in RECIPES}


def plan_and_write(path, changes):
    recipe = load_recipe(path, changes)
    assert parse_recipe(read_yaml(dump_recipe(recipe))) == recipe
    table = shifted_sigmas(recipe.rollout.steps, recipe.rollout.shift or 3.0)
    for iteration in (0, recipe.run.iterations - 1):
        plan_json(make_plan(recipe, iteration, table), recipe)
    return recipe


REST = pytest.param(range(FIRST, ALL), marks=pytest.mark.long)


@pytest.mark.parametrize("numbers", [range(FIRST), REST], ids=["sample", "all"])
def test_hostile_recipes_end_in_a_plan_or_in_one_line(tmp_path, numbers):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    path = tmp_path / "r.yaml"
    good = 0
    for number in numbers:
        content, changes = case(number)
        path.write_bytes(content)
        good += outcome(f"recipe {number}", plan_and_write, path, changes)[1] is None
    assert 0 < good < len(numbers)  # the fuzzer reaches both ends
