"""Credit against a gradient that is known otherwise: that of the expected reward on a mixture of Gaussians whose
velocity has a closed form, rolled out with the engine's own coefficients, noise, credit, weights and loss.
"""

import functools

import numpy as np
import pytest
import torch

from flowgrove.plan.planner import make_plan
from flowgrove.recipe.schema import Credit
from gaussian_mixture import (
    MEANS,
    SHARES,
    SPREAD,
    Forests,
    pathwise_gradient,
    rewards,
    run_trajectories,
    true_gradient,
    velocity,
)
from planner_cases import recipe_with

PROMPTS, SAMPLES = 24_000, 50_000
SURE = 22.5  # of χ² with 6 degrees of freedom: exceeded once in a thousand seeds
TREE = {
    "steps": 6, "shift": 1.0, "group_size": 8, "shared_initial_noise": False, "window": {"strategy": "all"},
    "tree": {"splits": [1, 2], "fanout": 2, "sibling_correlation": 0.0},
}  # fmt: skip
UNBIASED = {"baseline": "siblings", "std": "none", "adv_clip": 1e9}


@functools.cache
def rolled(correlation=0.0, splits=(1, 2), window="all"):
    """(forests of two trees of 4 leaves, or of as many as `splits` make; their true gradient)."""
    tree = {"splits": list(splits), "fanout": 2, "sibling_correlation": correlation}
    rollout = {**TREE, "group_size": 2 * 2 ** len(splits), "window": {"strategy": window}, "tree": tree}
    plan = make_plan(recipe_with(rollout), 0)
    return Forests.grown(plan, PROMPTS, seed=1), true_gradient(plan, SAMPLES, seed=2)


def estimates(forests, step_weight="leaves", **credit):
    """Of every prompt, in the scale of the gradient: the loss is a mean over the trained steps, and its
    log-probabilities are means over two elements.
    """
    return 2 * len(forests.plan.trained_steps) * forests.gradients(Credit(**credit), step_weight)


def misfit(found, truth, scale=1.0):
    """χ² of the difference between the means of `found` · scale [prompts, 6] and `truth` [batches, 6]; of several
    scales, of each.
    """
    scale = torch.as_tensor(scale, dtype=torch.float64)[..., None, None]
    difference = scale * found.mean(0)[:, None] - truth.mean(0)[:, None]
    covariance = scale**2 * torch.cov(found.T) / len(found) + torch.cov(truth.T) / len(truth)
    return (difference.mT @ torch.linalg.solve(covariance, difference)).squeeze((-1, -2))


def least_misfit(found, truth):
    """The same at the best scale: of the direction alone."""
    scales = np.geomspace(0.05, 5, 1000) * float(truth.mean(0).norm() / found.mean(0).norm())
    return misfit(found, truth, scales).min()


# the toy


@pytest.mark.parametrize("sigma", [1.0, 0.6, 0.1])
def test_the_velocity_is_the_mean_of_what_a_state_may_come_from(sigma):
    """By a sum over a grid of x0, of which each explains a state with its own noise."""
    axis = torch.linspace(-4.5, 4.5, 451, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    density = (SHARES * torch.exp(-(x0[:, None] - MEANS).square().sum(-1) / (2 * SPREAD**2))).sum(-1)
    for x in torch.tensor([[0.3, -0.2], [1.4, 0.5], [-0.6, 0.9]], dtype=torch.float64):
        noise = (x - (1 - sigma) * x0) / sigma
        weight = density * torch.exp(-noise.square().sum(-1) / 2)
        expected = (weight[:, None] * (noise - x0)).sum(0) / weight.sum()
        torch.testing.assert_close(velocity(x[None], sigma, MEANS)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ode", [False, True])
def test_the_true_gradient_is_that_of_finite_differences(ode):
    plan, step = make_plan(recipe_with({**TREE, "window": {"strategy": "none"}}), 0), 1e-5
    drawn = torch.randn(7, 1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, noise, expected = drawn[0], drawn[1:], []
    for place in range(6):
        moved = torch.zeros(6, dtype=torch.float64)
        moved[place] = step
        up, down = (
            rewards(run_trajectories(plan, x, noise, MEANS + sign * moved.view(3, 2), ode=ode)).mean()
            for sign in (1, -1)
        )
        expected.append((up - down) / (2 * step))
    found = pathwise_gradient(plan, x, noise, ode=ode)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)


# the estimators


def test_siblings_without_division_are_unbiased_where_all_steps_count_alike():
    forests, truth = rolled()
    assert misfit(estimates(forests, **UNBIASED), truth) < SURE


@pytest.mark.parametrize(
    ("step_weight", "credit"),
    [
        ("uniform", UNBIASED),  # late steps have more edges
        ("leaves", {**UNBIASED, "baseline": "depth"}),  # its mean holds the edge itself
    ],
)
def test_what_is_asked_of_an_unbiased_gradient_is_asked_rightly(step_weight, credit):
    forests, truth = rolled()
    assert misfit(estimates(forests, step_weight, **credit), truth) > 2 * SURE


@pytest.mark.parametrize("baseline", ["depth", "siblings"])
@pytest.mark.parametrize("std", ["group", "leaves"])
def test_a_divisor_of_each_prompts_own_turns_the_gradient(baseline, std):
    """No scale makes it the true one: prompts whose samples differ little, as the reward is flat there, count as much
    as those whose differences matter.
    """
    forests, truth = rolled()
    assert least_misfit(estimates(forests, baseline=baseline, std=std), truth) > 4 * SURE


@pytest.mark.parametrize(
    ("baseline", "factor"),
    [
        ("siblings", 0.5),  # 1 − ρ
        ("depth", 1 - 1.5 / 4),  # 1 − (1 + (K − 1)·ρ)/n of 4 nodes
    ],
)
def test_correlated_siblings_shrink_the_gradient_of_a_split(baseline, factor):
    """Two trees of one split, the only step with noise: ρ = 0.5, K = 2, n = 4."""
    forests, truth = rolled(0.5, (1,), "none")
    assert [step.index for step in forests.plan.trained_steps] == [1]
    found = estimates(forests, **{**UNBIASED, "baseline": baseline})
    assert misfit(found, factor * truth) < SURE
    assert misfit(found, truth) > 2 * SURE


def test_edges_behind_a_split_know_nothing_of_its_correlation():
    """Noise of their own: with only the steps that do not split trained, ρ leaves the gradient as it is."""
    tree = {"splits": [0], "fanout": 2, "sibling_correlation": 0.5}
    rollout = {**TREE, "group_size": 4, "window": {"strategy": "all"}, "tree": tree}
    plan = make_plan(recipe_with(rollout, prune={"kind": "depth", "depths": 1, "first": 0, "stop": 5}), 0)
    assert [step.index for step in plan.trained_steps] == [1, 2, 3, 4]
    found = estimates(Forests.grown(plan, PROMPTS, seed=4), **UNBIASED)
    assert misfit(found, true_gradient(plan, SAMPLES, seed=5)) < SURE
