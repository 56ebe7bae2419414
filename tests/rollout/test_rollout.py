"""The rollout: every distinct state once, the same noise whatever the batch, no host reads."""

import pytest
import torch

from flowgrove.rollout.forest import leaf_path_logp
from flowgrove.rollout.loop import rollout
from flowgrove_kernels import INITIAL_STEP, NoiseKey, clean_estimate, flow_step, philox_normal
from host_reads import count_host_reads
from policy_cases import TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from rollout_cases import CPS, FLAT, TAIL, TREE, UNSHARED_NOISE


def one_trajectory(recipe, policy, prompts, prompt: int, leaf: int):
    """A leaf's whole path computed alone, batch 1, from the noise function: the published loop."""
    plan, rows = plan_and_coefficients(recipe)
    seed, shape = recipe.run.seed, policy.adapter.latent_shape

    def node_at(step_out: int) -> int:
        return leaf // (plan.leaves // step_out)

    prompt_of = torch.tensor([prompt])
    x = philox_normal((1, *shape), NoiseKey(seed, 0, INITIAL_STEP, prompt, node_at(plan.roots))).double()
    history, total = None, torch.zeros(1, dtype=torch.float64)
    for step in plan.steps:
        sigma = torch.tensor([step.sigma], dtype=torch.float32)
        v, uncond, scale = policy.velocity(x, sigma, prompts, prompt_of)
        key = (
            NoiseKey(seed, 0, step.index, prompt, node_at(step.nodes_out), node_at(step.nodes_in))
            if step.stochastic
            else None
        )
        row = rows[step.index]
        needed = history if bool(row.prev_coef[0] != 0) else None
        correlation = plan.sibling_correlation if key else 0.0
        guidance = {"v_uncond": uncond, "guidance_scale": scale}
        history = clean_estimate(x, v, sigma, **guidance)
        x, logp = flow_step(x, v, row, key=key, history=needed, sibling_correlation=correlation, **guidance)
        total += logp
    return x[0], total[0]


@pytest.mark.parametrize(
    "sections", [FLAT, UNSHARED_NOISE, TREE, TAIL, CPS], ids=["flat", "unshared_noise", "tree", "tail", "cps"]
)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_every_leaf_is_the_trajectory_that_the_published_loop_computes_alone(sections, guidance):
    recipe, policy = small_recipe(**sections), policy_of(guidance=guidance)
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=recipe.run.seed, iteration=0)
    path_logp = leaf_path_logp(forest)
    for prompt, leaf in [(0, 0), (1, plan.leaves - 1), (2, plan.leaves // 2)]:
        x, logp = one_trajectory(recipe, policy, prompts, prompt, leaf)
        found = forest.leaves[prompt * plan.leaves + leaf]
        assert torch.allclose(found, x, rtol=0, atol=1e-11)
        assert torch.allclose(path_logp[prompt, leaf], logp, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sections", [FLAT, UNSHARED_NOISE, TREE, TAIL], ids=["flat", "unshared_noise", "tree", "tail"])
def test_rows_through_the_transformer_equal_the_planned_forwards(sections):
    recipe, policy = small_recipe(**sections), policy_of()
    plan, rows = plan_and_coefficients(recipe)
    seen = []
    hook = policy.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    rollout(plan, rows, policy, encoded(policy), runner_of(policy), seed=1, iteration=0)
    hook.remove()
    assert sum(seen) == plan.counts.rollout_forwards * len(TEXTS)


@torch.no_grad()
def test_leaves_do_not_depend_on_prompt_order_batch_or_micro_batch():
    recipe = small_recipe()
    plan, rows = plan_and_coefficients(recipe)

    def leaves(policy, texts, first):
        return rollout(
            plan, rows, policy, encoded(policy, texts), runner_of(policy), seed=5, iteration=3, first_prompt=first
        ).leaves.view(len(texts), plan.leaves, -1)

    together = leaves(policy_of(), TEXTS, 0)
    alone = torch.cat([leaves(policy_of(), [text], index) for index, text in enumerate(TEXTS)])
    small_passes = leaves(policy_of(tokens=80), TEXTS, 0)
    assert runner_of(policy_of(tokens=80)).budget.rows == 2
    assert torch.allclose(together, alone, rtol=0, atol=1e-11)
    assert torch.allclose(together, small_passes, rtol=0, atol=1e-11)
    assert not torch.allclose(together[0], together[1], atol=0.1), (
        "prompts must differ, or the comparison proves nothing"
    )


@torch.no_grad()
def test_initial_noise_is_bit_equal_for_any_prompt_order():
    shape = (3, *policy_of().adapter.latent_shape)
    forward = philox_normal(shape, NoiseKey(7, 2, INITIAL_STEP, torch.tensor([0, 1, 2]), 0))
    backward = philox_normal(shape, NoiseKey(7, 2, INITIAL_STEP, torch.tensor([2, 1, 0]), 0))
    assert torch.equal(forward, backward.flip(0))


@torch.no_grad()
def test_siblings_share_their_parent_and_part_at_the_split():
    recipe = small_recipe(**TREE)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy_of(), encoded(policy_of()), runner_of(policy_of()), seed=1, iteration=0)
    first = forest.states[forest.first_row[1] : forest.first_row[1] + 2]
    assert plan.steps[0].fanout == 2
    assert not torch.allclose(first[0], first[1], atol=1e-2)
    assert len(forest.states) == len(TEXTS) * (1 + 2 + 2 + 4), (
        "levels 0 to 3, the ends of the trained steps, and no other"
    )


@pytest.mark.parametrize("sections", [FLAT, TREE, TAIL], ids=["flat", "tree", "tail"])
def test_no_host_read_in_rollout(sections):
    recipe, policy = small_recipe(**sections), policy_of(dtype="fp32")
    plan, rows = plan_and_coefficients(recipe)
    prompts = encoded(policy)
    assert count_host_reads(lambda: rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0)) == 0
