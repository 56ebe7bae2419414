"""rollout.guidance_range and rollout.cache: cheaper forwards where nothing needs a gradient or a ratio, off unless
asked for, and shown by plan.
"""

import numpy as np
import pytest
import torch

from engine_cases import succeed, tiny_recipe
from flowgrove.credit import assign_credit
from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.models.runner import cached_layers
from flowgrove.plan.memory import MemoryModel
from flowgrove.plan.planner import make_plan
from flowgrove.rollout.loop import rollout
from flowgrove.update.passes import Rolled
from policy_cases import CPU, TEXTS, plan_and_coefficients, policy_of, runner_of, small_recipe
from tiny_families import MODELS, write_pipeline
from update_cases import Recorder

ROLLOUT = {"steps": 10, "window": {"strategy": "frozen", "size": 2, "start": 2}}


def rows_seen(policy, recipe, **options):
    """Leaves, and the rows of every forward of the transformer."""
    plan, rows = plan_and_coefficients(recipe)
    seen = []
    hook = policy.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    forest = rollout(plan, rows, policy, policy.encode(TEXTS), runner_of(policy), seed=1, iteration=0, **options)
    hook.remove()
    return forest, seen


@pytest.mark.parametrize(
    ("interval", "guided"), [(None, range(10)), ((1, 4), [1, 2, 3]), ((4, 7), [2, 3, 4, 5, 6]), ((0, 1), [0, 2, 3])]
)
def test_steps_outside_the_range_run_one_row_for_one_unless_they_have_noise(interval, guided):
    recipe, policy = small_recipe(rollout={**ROLLOUT, "guidance_range": interval}), policy_of(guidance=2.5)
    plan, _ = plan_and_coefficients(recipe)
    _, seen = rows_seen(policy, recipe)
    assert seen == [len(TEXTS) * step.nodes_in * (2 if step.index in guided else 1) for step in plan.steps]


def test_a_step_of_a_compressed_tail_is_guided_by_where_it_begins_in_the_schedule():
    """The tail's 3 steps stand for steps 4 to 9: they begin at 4, 6 and 8."""
    tail = {"tail": {"compress": 0.5}}
    guided = {}
    for last in (5, 7, 9):
        plan, _ = plan_and_coefficients(small_recipe(rollout={**ROLLOUT, **tail, "guidance_range": (4, last)}))
        guided[last] = [step.index for step in plan.steps if step.index > 3 and plan.guided(step)]
    assert [step.position for step in plan.steps] == [0, 1, 2, 3, 4, 6, 8]
    assert guided == {5: [4], 7: [4, 5], 9: [4, 5, 6]}


def test_an_unguided_step_is_the_step_of_a_model_without_guidance():
    recipe = small_recipe(
        rollout={**ROLLOUT, "window": {"strategy": "none"}, "shared_initial_noise": False, "guidance_range": [9, 10]}
    )
    found, _ = rows_seen(policy_of(guidance=2.5), recipe)
    plain, _ = rows_seen(policy_of(guidance=1.0), recipe)
    guided, _ = rows_seen(
        policy_of(guidance=2.5),
        small_recipe(rollout={**ROLLOUT, "window": {"strategy": "none"}, "shared_initial_noise": False}),
    )
    assert (found.leaves - plain.leaves).norm() < 0.5 * (guided.leaves - plain.leaves).norm()
    assert not torch.allclose(found.leaves, plain.leaves, atol=1e-3), "the last step is guided"


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write_pipeline("flux", tmp_path_factory.mktemp("models") / "flux")


def flux_policy(folder, **rollout_keys):
    model = {**MODELS["flux"], "path": str(folder), "dtype": "fp32", "gradient_checkpointing": False}
    recipe = small_recipe(model=model, rollout={**ROLLOUT, **rollout_keys}, update={"updates_per_iteration": 1})
    return Policy.load(recipe, CPU, TEXTS), recipe


@pytest.mark.parametrize(
    "cache", [{"interval": 2, "order": 0}, {"interval": 3, "order": 1}, {"interval": 4, "order": 2}]
)
@pytest.mark.parametrize("budget", [4096, 100])
def test_attention_runs_where_the_plan_says_and_nowhere_else(flux, cache, budget):
    policy, recipe = flux_policy(flux, cache=cache)
    runner_of(policy).budget.resize(budget)
    plan, _ = plan_and_coefficients(recipe)
    layers = [
        block.attn for block in (*policy.transformer.transformer_blocks, *policy.transformer.single_transformer_blocks)
    ]
    ran, before = [], [layer.forward for layer in layers]
    hook = layers[0].to_q.register_forward_hook(lambda module, args, output: ran.append(len(args[0])))
    found, _ = rows_seen(policy, recipe)
    hook.remove()
    computed = [step for step in plan.steps if not plan.extrapolates(step)]
    assert sum(ran) == sum(step.nodes_in for step in computed) * len(TEXTS)
    assert len(computed) < len(plan.steps)
    assert [layer.forward for layer in layers] == before, "training sees the model as it was"
    plain, _ = rows_seen(policy, small_recipe(rollout=ROLLOUT))
    assert not torch.equal(found.leaves, plain.leaves)
    assert (found.leaves - plain.leaves).norm() < 0.3 * plain.leaves.norm()
    assert torch.equal(found.states, plain.states), "what trains was computed in full"


def test_each_expert_extrapolates_from_its_own_steps(folders):
    """Of both experts the first two of the steps without noise are computed, then every second one."""
    model = {**MODELS["wan_a14b"], "path": folders["wan_a14b"], "dtype": "fp32", "gradient_checkpointing": False}
    rollout_keys = {"steps": 12, "shift": 3.0, "window": {"strategy": "frozen", "size": 1, "start": 0}}
    cached = {**rollout_keys, "cache": {"interval": 2}}
    recipe = small_recipe(model=model, rollout=cached, update={"updates_per_iteration": 1})
    policy = Policy.load(recipe, CPU, TEXTS)
    plan, _ = plan_and_coefficients(recipe)
    assert [step.expert for step in plan.steps] == ["high"] * 4 + ["low"] * 8
    assert [step.index for step in plan.steps if plan.extrapolates(step)] == [3, 6, 8, 10]
    ran = {"high": [], "low": []}
    for expert, rows in ran.items():
        layer = policy.transformer[expert].blocks[0].attn1.to_q
        layer.register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(args[0])))
    found, _ = rows_seen(policy, recipe)
    for expert, rows in ran.items():
        computed = [step for step in plan.steps if step.expert == expert and not plan.extrapolates(step)]
        assert sum(rows) == sum(step.nodes_in for step in computed) * len(TEXTS)
    plain, _ = rows_seen(policy, small_recipe(model=model, rollout=rollout_keys))
    assert not torch.equal(found.leaves, plain.leaves)
    assert (found.leaves - plain.leaves).norm() < 0.3 * plain.leaves.norm()
    assert torch.equal(found.states, plain.states), "what trains was computed in full"


def test_training_after_a_cached_rollout_equals_training_after_a_plain_one(flux):
    policy, recipe = flux_policy(flux, cache={"interval": 3})
    plain = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"cache": None})})
    gradients = []
    for each in (recipe, plain):
        plan, rows = plan_and_coefficients(each)
        prompts = policy.encode(TEXTS)
        forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0)
        credit = assign_credit(plan, each.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
        recorder = Recorder(each, policy)
        recorder.run([Rolled(policy, forest, prompts, credit, rows)])
        gradients.append(torch.cat([g.flatten() for g in recorder.gradients[0]]))
    assert torch.equal(*gradients)


def test_a_cache_leaves_no_forward_behind(flux):
    """Which torch.compile would take for other modules, and compile their blocks anew."""
    policy, recipe = flux_policy(flux, cache={"interval": 2})
    own = {name for name, module in policy.transformer.named_modules() if "forward" in vars(module)}
    attention = {name for name, _ in policy.transformer.named_modules() if name.endswith(".attn")}
    with runner_of(policy, recipe).caching(policy, recipe.rollout.cache):
        hooked = {name for name, module in policy.transformer.named_modules() if "forward" in vars(module)}
    assert hooked - own == attention != set()
    rows_seen(policy, recipe)
    assert {name for name, module in policy.transformer.named_modules() if "forward" in vars(module)} == own


def cached_tensors(policy):
    states = (
        state
        for layer in cached_layers(policy.transformer)
        for hook in layer._diffusers_hook.hooks.values()
        for state in hook.state_manager._state_cache.values()
    )
    return [factor for state in states for factors in state.taylor_factors.values() for factor in factors.values()]


def test_a_cache_takes_what_is_predicted_and_gives_it_back_after_a_failure(flux):
    policy, recipe = flux_policy(flux, cache={"interval": 2, "order": 1})
    plan, _ = plan_and_coefficients(recipe)
    plain = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"cache": None})})
    with_cache, without = (MemoryModel(each, plan, "cpu").at(4096).stages["rollout"] for each in (recipe, plain))
    rows = recipe.data.prompts_per_iteration * plan.leaves
    x, prompts = torch.randn(rows, *policy.adapter.latent_shape), policy.encode(TEXTS[:1])
    prompt_of = torch.zeros(rows, dtype=torch.int64)
    runner = runner_of(policy, recipe)
    with torch.no_grad(), runner.caching(policy, recipe.rollout.cache):
        for sigma in (0.9, 0.7):
            with runner.cache_name("rows"):
                runner.velocity(policy, x, torch.full((rows,), sigma), prompts, prompt_of)
        held = cached_tensors(policy)
        assert sum(factor.nbytes for factor in held) == with_cache - without > 0
        runner.forget()
        assert cached_tensors(policy) == []


def predicted_cache(device, model, **keys):
    """Bytes that the prediction adds for a cache, with prompts of 8 leaves."""
    data = {"prompts": "unused.txt", "prompts_per_iteration": 6}
    found = []
    for cache in (None, {"interval": 2}):
        recipe = small_recipe(model=model, data=data, rollout={**ROLLOUT, "group_size": 8, "cache": cache, **keys})
        found.append(MemoryModel(recipe, plan_and_coefficients(recipe)[0], device).at(400).stages)
    plain, cached = found
    (stage,) = (name for name in plain if name.startswith("rollout"))
    return cached[stage] - plain[stage]


@pytest.mark.long
def test_the_cache_of_prompts_that_roll_out_together_is_predicted_of_each_expert(flux, folders):
    """On a GPU scoring runs beside a rollout of some prompts: half a pass of 400 tokens at the root's one row."""
    model = {**MODELS["flux"], "path": str(flux), "dtype": "fp32", "lora": {"rank": 2, "alpha": 4}}
    row = Policy.load(small_recipe(model=model), CPU).adapter.geometry.tokens
    together = -(-400 // (2 * row))
    assert 1 < together < 6
    assert predicted_cache("cuda", model) * 6 == predicted_cache("cpu", model) * together
    model = {**MODELS["wan_a14b"], "path": str(folders["wan_a14b"]), "dtype": "fp32", "lora": {"rank": 2, "alpha": 4}}
    frozen = {"strategy": "frozen", "size": 1}
    both = predicted_cache("cpu", model, steps=12, shift=3.0, window={**frozen, "start": 0})
    assert both == 2 * predicted_cache("cpu", model, steps=12, shift=3.0, window={**frozen, "start": 5})


def test_cached_steps_follow_the_last_stochastic_one():
    plan = make_plan(small_recipe(rollout={**ROLLOUT, "cache": {"interval": 3}}), 0)
    assert [step.index for step in plan.steps if plan.extrapolates(step)] == [6, 8, 9]
    without = make_plan(small_recipe(rollout=ROLLOUT), 0)
    assert not any(without.extrapolates(step) for step in without.steps)


def test_plan_shows_what_is_cheaper(tmp_path):
    for keys, word, expected in (
        ({"guidance_range": [3, 6]}, "unguided", [2, 6, 7]),
        ({"cache": {"interval": 2}}, "cached", [4, 6]),
    ):
        lines = succeed(
            "plan", tiny_recipe(tmp_path / word, model={"guidance_scale": 3.0}, rollout={"steps": 8, **keys})
        ).stdout.splitlines()
        steps = {
            int(line.split()[0]): line for line in lines if line.split() and line.split()[0].isdigit() and "." in line
        }
        assert [index for index, line in steps.items() if word in line] == expected
    assert "cheaper" not in succeed("plan", tiny_recipe(tmp_path / "plain")).stdout


def test_both_savings_together_are_refused():
    with pytest.raises(UserError, match="remove one of them"):
        small_recipe(rollout={"cache": {}, "guidance_range": [0, 2]})


@pytest.mark.parametrize(
    ("model", "sections", "said"),
    [
        ({}, {"rollout": {"guidance_range": [0, 3]}}, "model.guidance_scale is 1"),
        ({}, {"update": {"detach_unconditional": True}}, "model.guidance_scale is 1"),
        ({"guidance_scale": 3.0}, {"rollout": {"cache": {"interval": 3}}}, "no cache for the sd3 transformer"),
    ],
)
def test_what_cannot_be_left_out_is_said(model, sections, said):
    recipe = small_recipe(model=model, **sections)
    with pytest.raises(UserError, match=said):
        Policy.load(recipe, CPU)
