"""rollout.precision: which passes run in 8 bits, what that changes, and that trained steps never do."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.evaluation import rollout_distance
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.recordings import Recordings
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, runner_of, small_recipe

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

FP32 = {"model": {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False}}
WINDOW = {"strategy": "frozen", "size": 2, "start": 1}
TREE = {"splits": [0, 2], "fanout": 2}
RECIPES = {
    "dance": {"dynamics": "dance_sde", "window": {"strategy": "all"}},
    "mix": {"window": WINDOW},
    "mix_flash": {"window": WINDOW, "tail": {"compress": 0.5}},
    "branch": {"dynamics": "dance_sde", "tree": TREE, "window": {"strategy": "none"}},
    "branch_mix": {"tree": TREE, "window": WINDOW},
    "branch_mix_flash": {"tree": TREE, "window": WINDOW, "tail": {"compress": 0.5}},
}


def recipe_of(name="mix", **sections):
    content = {"rollout": {"steps": 8, "precision": "int8", **RECIPES[name]}, **FP32} | sections
    return small_recipe(**content)


@pytest.fixture(scope="module")
def policy():
    return Policy.load(recipe_of(), CPU)


class Counting(PassRunner):
    """Counts rows of passes by the step whose σ they have and whether they run in 8 bits."""

    def __init__(self, budget):
        super().__init__(budget)
        self.rows = Counter()

    def velocity(self, policy, x, sigma, *rest):
        eight_bits = policy.adapter.transformer is not policy.weights.transformer
        assert eight_bits == (policy.precision == "int8")
        self.rows[float(sigma[0]), eight_bits] += len(x)
        return super().velocity(policy, x, sigma, *rest)


def rolled(policy, recipe, plan=None, runner=None):
    own, coefficients = plan_and_coefficients(recipe)
    runner = runner or runner_of(policy, recipe)
    return rollout(plan or own, coefficients, policy, encoded(policy), runner, seed=3, iteration=0)


@pytest.mark.parametrize("name", RECIPES)
def test_untrained_steps_alone_run_in_8_bits(policy, name):
    recipe = recipe_of(name)
    plan, _ = plan_and_coefficients(recipe)
    counting = Counting(runner_of(policy, recipe).budget)
    rolled(policy, recipe, runner=counting)
    expected = {
        (torch.tensor(step.sigma, dtype=torch.float32).item(), not step.trained): len(TEXTS) * step.nodes_in
        for step in plan.steps
    }
    assert counting.rows == expected
    assert {step.trained for step in plan.steps} == {True, False}  # the last step of any plan is of the ODE


def test_a_loop_that_shares_nothing_runs_the_same_steps_in_8_bits(policy):
    recipe = recipe_of("branch_mix")
    plan, coefficients = plan_and_coefficients(recipe)
    counting = Counting(runner_of(policy, recipe).budget)
    rollout(plan, coefficients, policy, encoded(policy), counting, seed=3, iteration=0, share=False)
    cheap = {sigma for sigma, eight_bits in counting.rows if eight_bits}
    assert cheap == {torch.tensor(s.sigma, dtype=torch.float32).item() for s in plan.steps if not s.trained}


def test_pruned_steps_are_cheap_unless_their_log_probability_counts():
    prune = {"kind": "depth", "depths": 1, "first": 2, "stop": 2, "every": 10}
    plan, _ = plan_and_coefficients(recipe_of("branch", credit={"prune": prune}))
    pruned = plan.steps[2]
    assert (pruned.stochastic, pruned.trained, plan.cheap(pruned)) == (True, False, True)
    plan, _ = plan_and_coefficients(recipe_of("branch", credit={"prune": prune, "fusion_beta": 1.0}))
    assert not plan.cheap(plan.steps[2])
    assert plan.cheap(plan.steps[-1])


def test_without_a_precision_nothing_is_cheap():
    plan, _ = plan_and_coefficients(recipe_of("mix", rollout={"precision": None, "steps": 8}))
    assert not any(plan.cheap(step) for step in plan.steps)


def test_trained_states_have_the_full_precision_log_probability(policy):
    """From the states that the cheap steps have left, trained steps are those of a full-precision rollout."""
    recipe = recipe_of("mix", rollout={"steps": 8, "window": {"strategy": "frozen", "size": 2}, "precision": "int8"})
    plan, _ = plan_and_coefficients(recipe)
    cheap, full = (rolled(policy, recipe, each) for each in (plan, replace(plan, precision=None)))
    torch.testing.assert_close(cheap.logp, full.logp, rtol=0, atol=0)  # the window comes first
    torch.testing.assert_close(cheap.states, full.states, rtol=0, atol=0)
    assert not torch.equal(cheap.leaves, full.leaves)


def test_the_distance_is_that_of_two_rollouts_of_the_same_noise(policy):
    setup = Setup(recipe_of("mix_flash"))
    found = rollout_distance(setup, policy, runner_of(policy), TEXTS)
    plan, coefficients = setup.first_plan, plan_and_coefficients(setup.recipe)[1]
    each = []
    for text, number in zip(TEXTS, range(3), strict=True):
        cheap, full = (
            rollout(
                one, coefficients, policy, policy.encode([text]), runner_of(policy), seed=setup.recipe.run.seed,
                iteration=2**32 - 1, first_prompt=number,
            ).leaves.flatten(1).double()
            for one in (plan, replace(plan, precision=None))
        )  # fmt: skip
        each.append(((cheap - full).norm(dim=1) / full.norm(dim=1)).mean().item())
    # prompts alone in their passes: sums in another order make other activations round up
    assert found == pytest.approx(sum(each) / 3, rel=0.2)
    assert 0 < found < 0.2


def test_the_distance_records_no_graphs(policy):
    """Their shapes are of these few prompts, and a recording keeps its memory."""
    runner = PassRunner(runner_of(policy).budget, Recordings(policy.device))
    assert runner.records
    assert rollout_distance(Setup(recipe_of("mix_flash")), policy, runner, TEXTS[:1]) > 0  # a CPU could record none
    assert not len(runner.recordings)
    assert runner.records


@pytest.mark.parametrize(
    ("sections", "instead"),
    [
        ({"model": {"dtype": "fp64"}}, "write null, or another dtype"),
        ({"engine": {"distributed": "fsdp2"}}, "write null, or ddp"),
    ],
)
def test_what_cannot_go_together_is_refused(tmp_path, sections, instead):
    from flowgrove.recipe.checks import check_meaning

    with pytest.raises(UserError, match=instead) as refused:
        check_meaning(small_recipe(rollout={"precision": "int8"}, **{"model": {"dtype": "bf16"}, **sections}))
    assert "\n" not in str(refused.value)


def test_fp8_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="precision is fp8, but the run is on a cpu: write int8, or null"):
        Policy.load(recipe_of(rollout={"precision": "fp8"}), CPU)
