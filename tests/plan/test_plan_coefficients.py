"""Rows of a plan against MATH §1."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove_kernels import StepCoefficients, dpmpp_2m_coefficients, step_coefficients
from planner_cases import branch_tree, mix_window, recipe_with, recipes, user_error

FIELDS = ("x_coef", "v_coef", "prev_coef", "std", "precision", "log_norm")
DYNAMICS = ("flow_sde", "dance_sde", "wan_sde", "cps")


def assert_row(rows, index, expected):
    for name in FIELDS:
        assert torch.equal(getattr(rows, name)[index : index + 1], getattr(expected, name)), (index, name)


def euler(step):
    return step_coefficients("ode", step.sigma, step.sigma_next)


def row_of(coef, index):
    return tuple(getattr(coef, name)[index].item() for name in FIELDS)


@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("iteration", [0, 25 * 7, 25 * 20])
def test_window_steps_take_their_dynamics_and_all_others_euler(dynamics, iteration):
    plan = make_plan(recipe_with({**mix_window(), "dynamics": dynamics, "noise_level": 0.6}), iteration)
    rows = plan_coefficients(plan)
    second = 3 * 0.96 / (0.04 + 3 * 0.96)
    assert len(rows) == 25
    assert all(getattr(rows, name).dtype == torch.float32 for name in FIELDS)
    for step in plan.steps:
        noisy = step_coefficients(dynamics, step.sigma, step.sigma_next, noise_level=0.6, sigma_max=second)
        assert_row(rows, step.index, noisy if step.index in plan.window else euler(step))
    assert [index for index in range(25) if rows.std[index] > 0] == list(plan.window)


def tail_rows(count, **rollout):
    """Plan and rows of a window of 2 in 12 steps with a tail of `count` steps."""
    window = {"strategy": "frozen", "size": 2, "start": 1}
    plan = make_plan(recipe_with({"steps": 12, "window": window, "tail": {"compress": count / 9}, **rollout}), 0)
    assert len(plan.steps) == 3 + count
    return plan, plan_coefficients(plan)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_tail_is_euler_first_then_multistep_then_euler_at_its_end(dynamics):
    plan, rows = tail_rows(6, dynamics=dynamics)
    assert [step.solver for step in plan.steps[3:]] == ["dpmpp_2m"] * 6
    assert_row(rows, 3, euler(plan.steps[3]))
    for index in (4, 5, 6, 7):
        before, here = plan.steps[index - 1], plan.steps[index]
        assert_row(rows, index, dpmpp_2m_coefficients(before.sigma, here.sigma, here.sigma_next))
        assert rows.prev_coef[index] != 0
    assert_row(rows, 8, euler(plan.steps[8]))
    assert rows.prev_coef[:4].tolist() == [0.0] * 4


def test_multistep_rows_by_their_formula():
    plan, rows = tail_rows(5)

    def log_snr(sigma):
        return math.log((1 - sigma) / sigma)

    for index in (4, 5, 6):
        before, here, there = plan.steps[index - 1].sigma, plan.steps[index].sigma, plan.steps[index].sigma_next
        dt = there - here
        c = (log_snr(there) - log_snr(here)) / (2 * (log_snr(here) - log_snr(before))) * dt / here
        assert row_of(rows, index) == pytest.approx((1 - c, dt + here * c, c, 0, 0, 0), rel=3e-7, abs=0)


@pytest.mark.parametrize("count", [1, 2])
def test_tails_of_one_and_two_steps_are_euler(count):
    plan, rows = tail_rows(count)
    for step in plan.steps[3:]:
        assert_row(rows, step.index, euler(step))


def test_without_a_stochastic_step_the_first_two_rows_are_euler_because_sigma_prev_is_1():
    rollout = {"steps": 10, "shared_initial_noise": False, "window": {"strategy": "none"}, "tail": {"compress": 0.5}}
    plan = make_plan(recipe_with(rollout), 0)
    rows = plan_coefficients(plan)
    assert len(plan.steps) == 5
    for index in (0, 1, 4):
        assert_row(rows, index, euler(plan.steps[index]))
    assert rows.prev_coef[2] != 0
    assert rows.prev_coef[3] != 0


@settings(max_examples=60)
@given(recipes(), st.integers(0, 200))
def test_no_history_crosses_a_stochastic_step_or_a_fanout(recipe, iteration):
    plan = make_plan(recipe, iteration)
    rows = plan_coefficients(plan)
    after_noise = [step.index + 1 for step in plan.steps if step.stochastic or step.fanout > 1]
    without = {0, len(plan.steps) - 1, *after_noise, *(step.index for step in plan.steps if step.stochastic)}
    assert len(rows) == len(plan.steps)
    assert all(rows.prev_coef[index] == 0 for index in without)
    assert_row(rows, len(plan.steps) - 1, euler(plan.steps[-1]))
    assert all(bool(torch.isfinite(getattr(rows, name)).all()) for name in FIELDS)


@pytest.mark.parametrize(
    ("dynamics", "scale"), [("dance_sde", 4.0), ("flow_sde", 4.0), ("cps", 0.5), ("flow_sde", 1.7)]
)
def test_split_noise_scale_widens_the_noise_of_split_steps_and_nothing_else(dynamics, scale):
    splits = [0, 3, 6, 9]
    tree = {"splits": splits, "fanout": 2, "split_noise_scale": scale}
    plain = plan_coefficients(make_plan(recipe_with(branch_tree(dynamics=dynamics, noise_level=0.3)), 0))
    wide = plan_coefficients(make_plan(recipe_with(branch_tree(dynamics=dynamics, noise_level=0.3, tree=tree)), 0))
    for name in set(FIELDS) - {"std"}:
        assert torch.equal(getattr(wide, name), getattr(plain, name)), name
    expected = [std * (scale if index in splits else 1.0) for index, std in enumerate(plain.std.tolist())]
    assert wide.std.tolist() == pytest.approx(expected, rel=1.3e-7, abs=0)
    assert min(plain.std[splits].tolist()) > 0


def test_mistake_12_the_density_of_widened_noise_is_the_one_of_the_plain_step():
    """BranchGRPO's released code: noise of 4·s, density of s. MATH §1 keeps it as a choice that is written down."""
    tree = {"splits": [0, 3, 6, 9], "fanout": 2, "split_noise_scale": 4.0}
    plan = make_plan(recipe_with(branch_tree(dynamics="dance_sde", noise_level=0.3, tree=tree)), 0)
    rows = plan_coefficients(plan)
    for index in (0, 3, 6, 9):
        s = 0.3 * math.sqrt(plan.steps[index].sigma - plan.steps[index].sigma_next)
        assert row_of(rows, index)[3:] == pytest.approx(
            (4 * s, 1 / (2 * s * s), -math.log(s) - 0.5 * math.log(2 * math.pi)), rel=3e-7
        )


def test_rows_are_a_batch_on_the_cpu():
    rows = plan_coefficients(make_plan(recipe_with(branch_tree()), 0))
    assert isinstance(rows, StepCoefficients)
    assert rows.x_coef.shape == (20,)
    assert rows.x_coef.device.type == "cpu"


@pytest.mark.parametrize("level", [1e-30, 1e30])
def test_a_noise_level_that_no_row_can_hold_is_an_error_that_names_the_key(level):
    recipe = recipe_with(rollout={"noise_level": level})
    assert "rollout.noise_level" in user_error(plan_coefficients, make_plan(recipe, 0))


@pytest.mark.parametrize(("dynamics", "index"), [("flow_sde", 19), ("wan_sde", 0)])
def test_a_plan_blames_the_noise_level_for_no_row_that_it_is_not_in(dynamics, index):
    plan = make_plan(recipe_with(branch_tree(dynamics=dynamics)), 0)
    steps = list(plan.steps)
    assert [steps[i].stochastic for i in (0, 19)] == [True, False]
    steps[index] = replace(steps[index], sigma_next=steps[index].sigma)
    text = user_error(plan_coefficients, replace(plan, steps=tuple(steps)))
    assert text.startswith(f"step {index} of the rollout: step_coefficients needs")
