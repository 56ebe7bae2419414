"""Model folders with one file cut, emptied, removed or changed: an error of one line or a model that draws."""

import json
import random
import shutil
from contextlib import suppress

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.models.folders import TINY
from flowgrove.models.policy import Policy
from flowgrove.plan.memory import predict_memory
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from policy_cases import CPU, TEXTS, small_recipe
from tiny_families import MODELS, write_pipeline

FAMILIES = ("sd3", "flux", "qwen_image", "wan")
VALUES = (None, 0, -1, 3, 1e9, 2**40, "x", "", [], {}, [1], True, float("nan"), -5, 1.5)
SEEDS = [pytest.param(seed, marks=[] if seed < 12 else pytest.mark.long) for seed in range(300)]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write_pipeline(name, root / name) for name in FAMILIES[1:]} | {"sd3": TINY}


def change(rng, content):
    """One key or entry of a JSON value, somewhere inside."""
    if isinstance(content, list) and content:
        content[rng.randrange(len(content))] = rng.choice(VALUES)
    if not isinstance(content, dict) or not content:
        return
    key, kind = rng.choice(list(content)), rng.randrange(4)
    if kind == 0:
        del content[key]
    elif kind == 1:
        content[key] = rng.choice(VALUES)
    elif kind == 2 and isinstance(content[key], dict | list):
        change(rng, content[key])
    elif kind == 2 and isinstance(content[key], int):
        content[key] = rng.choice([content[key] + 1, content[key] * 2, 0])
    else:
        content["foreign"] = rng.choice(VALUES)


def damage(rng, file):
    kind = rng.randrange(5)
    if file.suffix == ".json" and kind < 4:
        content = json.loads(file.read_text())
        change(rng, content)
        file.write_text(json.dumps(content))
    elif kind == 0:
        file.unlink()
    elif kind == 1:
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size + 1)])
    elif kind == 2:
        file.write_bytes(b"")
    else:
        content = bytearray(file.read_bytes())
        content[rng.randrange(min(len(content), 3000))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_folder_is_one_line_or_draws(originals, tmp_path, seed):
    rng = random.Random(seed)
    name = FAMILIES[seed % len(FAMILIES)]
    folder = shutil.copytree(originals[name], tmp_path / "model")
    damage(rng, rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())))
    told = {**MODELS.get(name, {"adapter": "sd3", "height": 32, "width": 32}), "path": str(folder), "dtype": "fp32"}
    recipe = small_recipe(model=told, rollout={"shift": 3.0 if name == "wan" else None})

    def plan():
        predict_memory(recipe, make_plan(recipe, 0, recipe_sigmas(recipe)), "cpu")

    @torch.no_grad()
    def draw():
        policy = Policy.load(recipe, CPU, TEXTS)
        x = torch.zeros(len(TEXTS), *policy.adapter.latent_shape)
        policy.velocity(x, torch.full((len(TEXTS),), 0.5), policy.encode(TEXTS), torch.arange(len(TEXTS)))
        policy.decode(x)

    for action in (plan, draw):
        with suppress(UserError):  # always one line
            action()
