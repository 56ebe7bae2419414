"""What Z-Image's pipeline does beyond plain guidance, and prompts of different lengths in one pass."""

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.rollout.loop import rollout
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, encoded, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS

FAMILY = FAMILIES["z_image"]
PROMPTS = ["a red circle at the top left", "", "a red circle " * 40]
ODE = {"steps": 4, "shift": None, "group_size": 1, "shared_initial_noise": False, "window": {"strategy": "none"}}


def recipe_of(folders, rollout=None, **model):
    told = {**MODELS["z_image"], "path": folders["z_image"], "dtype": "fp32", "gradient_checkpointing": False, **model}
    return small_recipe(model=told, rollout=ODE | (rollout or {}), update={"updates_per_iteration": 1})


@torch.no_grad()
def drawn(recipe, prompts):
    """Our clean latents of these prompts, and the noise that they come from."""
    policy = Policy.load(recipe, CPU)
    plan = make_plan(recipe, 0, recipe_sigmas(recipe))
    forest = rollout(
        plan, plan_coefficients(plan), policy, encoded(policy, prompts), runner_of(policy), seed=3, iteration=9
    )
    numbers = torch.arange(len(prompts))
    key = NoiseKey(3, 9, INITIAL_STEP, numbers, torch.zeros_like(numbers))
    return forest.leaves, philox_normal((len(prompts), *policy.adapter.latent_shape), key)


def theirs(folders, recipe, prompts, noise, **options):
    pipe = FAMILY.pipeline.from_pretrained(folders["z_image"])
    pipe.set_progress_bar_config(disable=True)
    told = FAMILY.options(recipe.model.guidance_scale, prompts, recipe.model) | options
    return pipe(list(prompts), num_inference_steps=4, latents=noise, output_type="latent", **told).images


@pytest.mark.parametrize("limit", [0.7, 1.0, 1.3])
def test_normalised_guidance_is_the_pipelines(folders, limit):
    recipe = recipe_of(folders, guidance_scale=4.0, cfg_normalization=limit)
    found, noise = drawn(recipe, PROMPTS)
    assert (found - theirs(folders, recipe, PROMPTS, noise)).abs().max() <= 1e-4
    assert (found - drawn(recipe_of(folders, guidance_scale=4.0), PROMPTS)[0]).abs().max() > 1e-2


def test_truncated_guidance_is_guidance_in_the_first_steps(folders):
    """σ falls 1, 0.9, 0.75, 0.5 with the shift of 3: times up to 0.3 are the first three steps."""
    recipe = recipe_of(folders, {"guidance_range": [0, 3]}, guidance_scale=4.0)
    found, noise = drawn(recipe, PROMPTS)
    assert (found - theirs(folders, recipe, PROMPTS, noise, cfg_truncation=0.3)).abs().max() <= 1e-4
    assert (found - drawn(recipe_of(folders, guidance_scale=4.0), PROMPTS)[0]).abs().max() > 1e-2


def test_one_pass_of_prompts_of_different_lengths_leaves_every_state_its_prompt(folders):
    """A pass takes the longest first; here one holds all rows of a step."""
    recipe = recipe_of(folders, guidance_scale=1.0)
    together, noise = drawn(recipe, PROMPTS)
    for number, text in enumerate(PROMPTS):
        alone = theirs(folders, recipe, [text], noise[number : number + 1])
        assert (together[number] - alone[0]).abs().max() <= 1e-4


def test_a_limit_without_guidance_is_refused(folders):
    with pytest.raises(UserError, match=r"model.cfg_normalization: model.guidance_scale is 1.*remove it"):
        Policy.load(recipe_of(folders, guidance_scale=1.0, cfg_normalization=1.0), CPU)
