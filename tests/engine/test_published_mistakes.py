"""Mistakes that published training code made (numbers as in the project's list of prior art) and that have no test of
their own elsewhere.

Elsewhere: 1 and 3 in test_windows, 2 and 4 in test_sigmas and test_plan, 8 and 11 in test_credit, 9 in test_resume, 12
in test_rows, 17 in test_sd3.
"""

import numpy as np
import pytest
import torch

from flowgrove.credit import assign_credit
from flowgrove.rollout.loop import rollout
from flowgrove.run import summaries
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater, UpdateStats
from flowgrove_kernels import flow_logprob, grpo_loss_and_grad, step_coefficients
from policy_cases import TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe


def rolled(recipe, policy):
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=3, iteration=0)
    return forest, prompts, rows


def test_mistake_5_states_stay_fp32_whatever_the_compute_dtype():
    """logp of the stored states is the logp that the rollout computed:
    a state rounded to bf16 would be off by far more.
    """
    recipe, policy = small_recipe(), policy_of(dtype="bf16")
    forest, _, rows = rolled(recipe, policy)
    assert forest.states.dtype == torch.float32
    rounded = forest.states.bfloat16().float()
    step = forest.plan.trained_steps[0]
    first, after = forest.first_row[step.index], forest.first_row[step.index + 1]
    x, x_next = forest.states[first : first + 3], forest.states[after : after + 12]
    row = rows[torch.full((3,), step.index)]
    v = torch.zeros_like(x)
    exact, off = (flow_logprob(x, v, children, row, fanout=4) for children in (x_next, rounded[after : after + 12]))
    assert (exact - off).abs().max() > 1e-6, "rounding shows in logp, so keeping fp32 matters"


def test_mistake_6_rewards_and_advantages_are_float64_until_they_reach_the_loss():
    recipe = small_recipe()
    plan, _ = plan_and_coefficients(recipe)
    scores = np.array([[1000.0, 1000.0001, 1000.0002, 1000.0003]])[..., None]  # equal in fp16 and in bf16
    advantage = assign_credit(plan, recipe.credit, scores, [1.0])[plan.trained_steps[0].index].advantage
    assert advantage.dtype == np.float64
    assert np.all(np.diff(advantage[0]) > 0.5)


def test_mistake_10_every_step_of_the_optimiser_is_clipped_also_the_last_and_smallest():
    recipe = small_recipe(update={"max_grad_norm": 1e-3, "updates_per_iteration": 3})
    policy = policy_of()
    forest, prompts, rows = rolled(recipe, policy)
    credit = assign_credit(
        forest.plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), forest.plan.leaves, 1)), [1.0]
    )
    norms = []

    class Spy(Updater):
        def _step(self, *update):
            step = self.optimizer.step
            self.optimizer.step = lambda: norms.append(
                float(torch.stack([p.grad.norm() for p in self.parameters]).norm())
            )
            super()._step(*update)
            self.optimizer.step = step

    stats = Spy(recipe, policy, runner_of(policy)).run([Rolled(policy, forest, prompts, credit, rows)])
    assert len(norms) == 3
    assert all(norm <= 1.001e-3 for norm in norms)
    assert min(float(norm) for norm in stats.grad_norm) > 1e-3, "without clipping each would be larger"


def test_mistake_13_the_kl_term_has_a_gradient_and_the_weight_of_its_step():
    x, v, v_ref = (torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))
    zero, weight = torch.zeros(2), torch.ones(2)
    found = []
    for sigma_next in (0.4, 0.45):
        row = step_coefficients("dance_sde", 0.5, sigma_next, noise_level=0.3)[torch.zeros(2, dtype=torch.int64)]
        loss, grad, _ = grpo_loss_and_grad(
            x, v, x, row, None, zero, weight, clip_range=1e-3, v_ref=v_ref, kl_weight=1.0
        )
        b, s = row.v_coef[0], row.std[0]
        assert loss.kl[0] == pytest.approx(float(b**2 * (v[0] - v_ref[0]).square().mean() / (2 * s**2)), rel=1e-5)
        assert grad.abs().min() > 0
        found.append(float(loss.kl[0]))
    assert found[0] / found[1] == pytest.approx(2.0, rel=0.05), (
        "b² falls with Δ² and s² with Δ: the KL of a step is proportional to Δ"
    )


def test_mistake_16_guidance_scale_comes_from_the_recipe():
    x, sigma, prompt = torch.zeros(1, 4, 8, 8, dtype=torch.float64), torch.tensor([0.5]), torch.tensor([0])
    for scale in (1.7, 3.5):
        policy = policy_of(guidance=scale)
        v = policy.velocity(x, sigma, encoded(policy), prompt)
        assert policy.guidance_scale == scale
        assert v.uncond is not None


def test_mistake_18_clip_fractions_are_means_over_edges_not_sums_over_passes():
    stats = UpdateStats()
    for size, high in ((3, 3), (1, 0)):
        stats.ratio.append(torch.ones(size))
        stats.clipped.append(torch.tensor([1] * high + [0] * (size - high), dtype=torch.int8))
        stats.log_ratio.append(torch.zeros(size))
        stats.loss.append(torch.tensor(0.5))
    stats.grad_norm.append(torch.tensor(1.0))
    summary = summaries.update_summary(stats)
    assert summary["clipped_high"] == 0.75
    assert summary["clipped_low"] == 0.0
    assert summary["loss"] == 1.0
