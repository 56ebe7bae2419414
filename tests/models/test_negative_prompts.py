"""What guidance leads away from: the model's own text, the recipe's, or each row's."""

import pytest
import torch

from flowgrove.data.prompt import Prompt
from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.rollout.loop import rollout
from policy_cases import CPU, TEXTS, policy_of, runner_of, small_recipe

GUIDED = {"adapter": "sd3", "path": "tiny", "dtype": "fp64", "gradient_checkpointing": False, "guidance_scale": 3.0}
AWAY = ["a green cross", None, "a blue square at the centre"]


def unconditional(policy, prompts):
    x = torch.randn(len(prompts), *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    rows = torch.arange(len(prompts))
    with torch.no_grad():
        return policy.velocity(x, torch.full((len(prompts),), 0.6), policy.encode(prompts), rows).uncond


def test_each_row_is_led_away_from_its_own():
    policy = policy_of(guidance=3.0)
    prompts = [Prompt(text, negative=away) for text, away in zip(TEXTS, AWAY, strict=True)]
    found = unconditional(policy, prompts)
    for row, away in enumerate(AWAY):
        expected = unconditional(policy, [Prompt(text, negative=away) for text in TEXTS])[row]
        assert (found[row] - expected).abs().max() <= 1e-12
        assert ((found[row] - unconditional(policy, TEXTS)[row]).abs().max() > 1e-3) == (away is not None)


def test_the_recipes_own_stands_in_for_rows_without_one():
    policy = Policy.load(small_recipe(model={**GUIDED, "negative_prompt": "a green cross"}), CPU)
    rows = [Prompt(text, negative="a green cross") for text in TEXTS]
    assert torch.equal(unconditional(policy, TEXTS), unconditional(policy_of(guidance=3.0), rows))
    its_own = unconditional(policy, [Prompt(TEXTS[0], negative="")])
    assert torch.equal(its_own, unconditional(policy_of(guidance=3.0), TEXTS[:1]))


def test_without_guidance_it_is_an_error():
    with pytest.raises(UserError, match=r"model\.negative_prompt: model\.guidance_scale is 1"):
        Policy.load(small_recipe(model={**GUIDED, "guidance_scale": 1.0, "negative_prompt": "x"}), CPU)


def test_it_serves_an_evaluation_that_alone_is_guided():
    model = {**GUIDED, "guidance_scale": 1.0, "negative_prompt": "a green cross"}
    policy = Policy.load(small_recipe(model=model, run={"eval": {"guidance_scale": 3.0}}), CPU).guided_by(3.0)
    rows = [Prompt(text, negative="a green cross") for text in TEXTS]
    assert torch.equal(unconditional(policy, TEXTS), unconditional(policy_of(guidance=3.0), rows))


@torch.no_grad()
def test_leaves_of_a_mixed_batch_are_those_of_each_prompt_alone():
    recipe = small_recipe(model=GUIDED, rollout={"tree": {"splits": [0, 1], "fanout": 2}})
    policy, plan = policy_of(guidance=3.0), make_plan(recipe, 0)
    prompts = [Prompt(text, negative=away) for text, away in zip(TEXTS, AWAY, strict=True)]

    def leaves(some, first):
        noise = {"seed": 1, "iteration": 0, "first_prompt": first}
        return rollout(plan, plan_coefficients(plan), policy, policy.encode(some), runner_of(policy), **noise).leaves

    whole = leaves(prompts, 0).unflatten(0, (len(prompts), -1))
    for number, prompt in enumerate(prompts):
        assert (whole[number] - leaves([prompt], number)).abs().max() <= 1e-10
