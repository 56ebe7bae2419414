"""The shipped recipes, each in float64: the shared run and the loop that runs every trajectory and edge
alone give the same losses and gradients.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from flowgrove.credit import assign_credit
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.recipe.loading import load_recipe
from flowgrove.rollout.loop import rollout
from flowgrove.update.passes import Rolled
from policy_cases import CPU, TEXTS, runner_of
from update_cases import Recorder

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLED = ("shapes_mix", "shapes_branch_mix_flash")  # make test runs these, make test-long all
NAMES = sorted(path.stem for path in RECIPES.glob("shapes_*.yaml"))
ITERATION = 6  # windows have moved


def one_iteration(name: str, share: bool):
    """Leaves, gradient of all updates, losses, planned counts,
    and the rows that went through the transformer (rollout, backward).
    """
    overrides = ("model.dtype=fp64", "engine.token_budget=1600", f"engine.share={str(share).lower()}")
    recipe = load_recipe(RECIPES / f"{name}.yaml", overrides)
    policy = Policy.load(recipe, CPU)
    moved = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.weights.trainable().values():  # away from the reference model
            parameter.add_(torch.randn(parameter.shape, generator=moved, dtype=parameter.dtype), alpha=1e-3)
    plan = make_plan(recipe, ITERATION)
    rows, prompts, seen, backward = plan_coefficients(plan), policy.encode(TEXTS[:2]), [], []

    def watch(module, arguments, keywords, output):
        seen.append(len(keywords["hidden_states"]))
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: backward.append(len(gradient)))

    hook = policy.transformer.register_forward_hook(watch, with_kwargs=True)
    forest = rollout(
        plan, rows, policy, prompts, runner_of(policy), seed=recipe.run.seed, iteration=ITERATION, share=share
    )
    forwards = sum(seen)
    scores = np.random.default_rng(0).random((2, plan.leaves, 1))
    credit = assign_credit(plan, recipe.credit, scores, [1.0])
    recorder = Recorder(recipe, policy)
    generator = torch.Generator().manual_seed(1)
    # ratios of later updates away from 1
    forest.logp += 1e-3 * torch.randn(forest.logp.shape, generator=generator, dtype=torch.float64)
    stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    hook.remove()
    gradient = torch.cat([g.flatten() for update in recorder.gradients for g in update])
    return forest.leaves, gradient, float(torch.stack(stats.loss).sum()), plan.counts, forwards, sum(backward), recipe


@pytest.mark.parametrize(
    "name", [name if name in SAMPLED else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
)
def test_sharing_changes_the_cost_of_a_recipe_and_nothing_else(name):
    leaves, gradient, loss, counts, forwards, passes, recipe = one_iteration(name, share=True)
    alone_leaves, alone_gradient, alone_loss, _, alone_forwards, alone_passes, _ = one_iteration(name, share=False)
    assert torch.allclose(leaves, alone_leaves, rtol=0, atol=1e-10)
    assert float(gradient.norm()) > 1e-6
    assert float((gradient - alone_gradient).norm()) <= 1e-10 * float(gradient.norm())
    assert loss == pytest.approx(alone_loss, rel=1e-10)
    assert forwards == 2 * counts.rollout_forwards
    assert alone_forwards == 2 * counts.unshared_rollout_forwards
    if recipe.update.step_fraction == 1.0:  # else each prompt draws its own steps; the plan counts prompt 0
        assert passes == 2 * counts.train_passes
        assert alone_passes == 2 * counts.unshared_train_passes


def test_there_is_a_recipe_for_every_algorithm():
    assert {name.removeprefix("shapes_") for name in NAMES} == {
        "dance",
        "flow",
        "flow_fast",
        "mix",
        "mix_flash",
        "branch",
        "branch_mix",
        "branch_mix_flash",
        "grove",
    }
