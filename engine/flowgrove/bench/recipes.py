"""What the benchmarks of whole iterations train: an algorithm's rollout, the recipe around it, prompts and rewards."""

from typing import Any

import torch
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.rewards.jpeg_size import JpegSizeReward
from flowgrove.rewards.registry import Rewards

LEAVES = 16
LENGTHS = 3  # of prompts, in words
_TREE = {"splits": [0, 3, 6, 9], "fanout": 2}
_DANCE = {"dynamics": "dance_sde", "noise_level": 0.3}
_WINDOW = {"strategy": "progressive", "size": 4, "start": 0}
_FLASH = {"tail": {"compress": 0.4}}
_EVERY = {"window": {"strategy": "all"}}
_FAST = {"strategy": "random", "size": 3, "range": [0, 10]}  # in the first half of the steps
RECIPES: dict[str, dict[str, Any]] = {  # 20 steps and 16 leaves, as BranchGRPO compares them
    "dance": {**_DANCE, **_EVERY},
    "flow": {"dynamics": "flow_sde", "noise_level": 0.7, "shared_initial_noise": False, **_EVERY},
    "flow_fast": {"dynamics": "cps", "noise_level": 0.8, "window": _FAST},
    "mix": {"window": _WINDOW},
    "mix_flash": {"window": _WINDOW, **_FLASH},
    "branch": {**_DANCE, "tree": _TREE, **_EVERY},
    "branch_mix": {**_DANCE, "tree": _TREE, "window": _WINDOW},
    "branch_mix_flash": {**_DANCE, "tree": _TREE, "window": _WINDOW, **_FLASH},
    "grove": {"tree": {"splits": [0, 1], "fanout": 4}, "window": {"strategy": "frozen", "size": 2}, **_FLASH},
}


def bench_recipe(model: dict[str, Any], prompts: int, rollout: dict[str, Any], engine: dict[str, Any]) -> Recipe:
    """20 steps and one update per iteration, with the sections `model` and `engine` and the rest of
    `rollout` as given. Raises UserError.
    """
    return parse_recipe({
        "model": model,
        "data": {"prompts": "unused.txt", "prompts_per_iteration": prompts, "embedding_cache": "none"},
        "rollout": {"steps": 20, "shift": 3.0, **rollout},
        "reward": [{"name": "jpeg_size"}],
        "update": {"lr": 1e-6, "clip_range": 1e-3, "updates_per_iteration": 1},
        "engine": engine,
    })  # fmt: skip


def bench_prompts(count: int) -> list[str]:
    """Prompts of LENGTHS lengths in turn."""
    return [f"a picture number {number}{' of a long row' * (number % LENGTHS)}" for number in range(count)]


def bench_rewards(recipe: Recipe, device: torch.device) -> Rewards:
    """Those of a `bench_recipe`, without ties: leaves that score alike have no advantage and do not train, and then the
    passes of an iteration would hang on how a machine rounds.
    """
    rewards = Rewards(recipe, device)
    rewards.scorers = {name: _Untied() for name in rewards.scorers}
    return rewards


class _Untied(JpegSizeReward):
    """File sizes, of which small pictures have few, and brightness."""

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        return super().__call__(pictures, prompts) + to_host(pictures.double().mean((1, 2, 3)))
