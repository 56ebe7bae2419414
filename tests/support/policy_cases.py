"""A float64 policy on the embedded pipeline and small plans, shared by the engine's tests."""

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from flowgrove.data.prompt import pictures_of
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import RolloutPlan, make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove_kernels import StepCoefficients
from pictured import pictured

_RUNNERS: WeakKeyDictionary[Policy, PassRunner] = WeakKeyDictionary()
CPU = torch.device("cpu")
TEXTS = ["a red circle at the top left", "a blue square at the centre", "a green cross left of a black circle"]


def small_recipe(**sections: dict[str, Any]) -> Recipe:
    """A window of 2 in 5 steps, 4 leaves, 2 updates, float64; sections are merged key by key."""
    content: dict[str, Any] = {
        "model": {"adapter": "sd3", "path": "tiny", "dtype": "fp64", "gradient_checkpointing": False},
        "data": {"prompts": "unused.txt", "prompts_per_iteration": len(TEXTS)},
        "rollout": {"steps": 5, "shift": 1.5, "group_size": 4, "window": {"strategy": "frozen", "size": 2, "start": 1}},
        "reward": [{"name": "shapes"}],
        "update": {"updates_per_iteration": 2, "clip_range": 1e-3, "lr": 1e-4},
        "engine": {"device": "cpu"},
    }
    for name, keys in sections.items():
        content[name] = {**content[name], **keys} if isinstance(keys, dict) and name in content else keys
    return parse_recipe(content)


@cache
def policy_of(dtype: str = "fp64", guidance: float = 1.0, tokens: int | str = "auto") -> Policy:
    """Loaded once per setting; tests restore what they change."""
    recipe = small_recipe(
        model={
            "adapter": "sd3",
            "path": "tiny",
            "dtype": dtype,
            "gradient_checkpointing": False,
            "guidance_scale": guidance,
        },
        engine={"device": "cpu", "token_budget": tokens},
    )
    policy = Policy.load(recipe, CPU)
    runner_of(policy, recipe)
    return policy


def runner_of(policy: Policy, recipe: Recipe | None = None) -> PassRunner:
    """One for each policy: that of the recipe that it is first asked for with (None: of `small_recipe`)."""
    if policy not in _RUNNERS:
        _RUNNERS[policy] = PassRunner.of(recipe or small_recipe(), policy)
    return _RUNNERS[policy]


def plan_and_coefficients(recipe: Recipe, iteration: int = 0) -> tuple[RolloutPlan, StepCoefficients]:
    plan = make_plan(recipe, iteration, recipe_sigmas(recipe))
    return plan, plan_coefficients(plan)


def encoded(policy: Policy, texts: list[str] | None = None) -> Prompts:
    """Texts, which get source pictures where the model needs some, or prompts."""
    texts = texts or TEXTS
    if not any(pictures_of(text) for text in texts):
        size = policy.adapter.geometry
        count = max(policy.adapter.source_pictures[0], size.source_tokens // size.picture_tokens, size.source_pictures)
        texts = pictured(texts, count, (size.frames or 0) * policy.adapter.source_video)
    return policy.encode(texts)
