"""Every family on a CUDA GPU: what it draws there, that the host never waits for its passes, and that they can be
recorded.
"""

import numpy as np
import pytest
import torch

from flowgrove.credit import assign_credit
from flowgrove.models.families import family_of
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.recordings import Recordings
from flowgrove.rollout.loop import rollout
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from policy_cases import CPU, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
CUDA = torch.device("cuda")


MASKED = [name for name in FAMILIES if family_of(MODELS[name]["adapter"]).splits_texts()]


def recipe_of(folders, name, dtype, splits=False):
    model = {**MODELS[name], "path": folders[name], "dtype": dtype, "gradient_checkpointing": False}
    return small_recipe(model=model, engine={"device": "cuda", "split_lengths": splits})


def rolled(recipe, policy, prompts, runner, iteration=0):
    plan, rows = plan_and_coefficients(recipe, iteration)
    rows = rows.to(policy.device)
    return plan, rows, rollout(plan, rows, policy, prompts, runner, seed=1, iteration=iteration)


@pytest.mark.parametrize(("name", "splits"), [(name, False) for name in FAMILIES] + [(name, True) for name in MASKED])
def test_a_gpu_draws_what_a_cpu_draws(folders, name, splits):
    recipe = recipe_of(folders, name, "fp32", splits)
    leaves = []
    for device in (CPU, CUDA):
        policy = Policy.load(recipe, device)
        *_, forest = rolled(recipe, policy, encoded(policy), runner_of(policy, recipe))
        leaves.append(forest.leaves.cpu().double())
    torch.testing.assert_close(leaves[1], leaves[0], rtol=0, atol=1e-2 * leaves[0].abs().max().item())


@pytest.mark.parametrize(("name", "splits"), [(name, False) for name in FAMILIES] + [(name, True) for name in MASKED])
def test_rollout_and_update_never_wait_for_the_gpu(folders, name, splits):
    recipe = recipe_of(folders, name, "bf16", splits)
    policy = Policy.load(recipe, CUDA)
    prompts, updater = encoded(policy), Updater(recipe, policy, runner_of(policy, recipe))
    plan, rows = plan_and_coefficients(recipe)
    rows = rows.to(CUDA)
    scores = np.random.default_rng(0).random((len(prompts.texts), plan.leaves, 1))
    try:
        for mode in ("default", "error"):  # the first round loads and compiles kernels
            torch.cuda.set_sync_debug_mode(mode)
            forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=0, iteration=0)
            torch.cuda.set_sync_debug_mode("default")
            credit = assign_credit(plan, recipe.credit, scores, [1.0])
            torch.cuda.set_sync_debug_mode(mode)
            stats = updater.run([Rolled(policy, forest, prompts, credit, rows)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack([loss.double().sum() for loss in stats.loss]).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_rollouts_equal_eager_ones(folders, name):
    recipe = recipe_of(folders, name, "fp32")
    policy = Policy.load(recipe, CUDA)
    plain, graphs = runner_of(policy, recipe), Recordings(CUDA)
    recording = PassRunner(plain.budget, graphs)
    prompts = encoded(policy)
    for iteration in range(2):
        *_, eager = rolled(recipe, policy, prompts, plain, iteration)
        *_, recorded = rolled(recipe, policy, prompts, recording, iteration)
        # other strides may take another convolution
        atol = 1e-4 * eager.leaves.abs().max().item()
        torch.testing.assert_close(recorded.leaves, eager.leaves, rtol=0, atol=atol)
    assert len(graphs) > 0
