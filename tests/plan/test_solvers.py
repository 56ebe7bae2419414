"""A solver is a row of a table: the planner, the coefficients and the rollout ask the row and compare no names."""

import typing

import pytest
import torch

from flowgrove.plan import planner
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.solvers import PLAIN, SOLVERS, Solver, history
from flowgrove.recipe.schema import Rollout, Tail
from flowgrove.rollout.loop import rollout
from flowgrove_kernels import coefficients
from planner_cases import mix_window, recipe_with
from policy_cases import encoded, plan_and_coefficients, policy_of, runner_of, small_recipe

TAIL = {"window": {"strategy": "frozen", "size": 2, "start": 1}, "tail": {"compress": 0.5}}


def test_recipes_name_rows_of_the_table_and_rows_have_coefficients():
    dynamics = typing.get_args(Rollout.model_fields["dynamics"].annotation)
    tails = typing.get_args(Tail.model_fields["solver"].annotation)
    assert {PLAIN, *dynamics, *tails} == set(SOLVERS)
    assert all(SOLVERS[name].stochastic for name in dynamics)
    assert not any(SOLVERS[name].stochastic for name in (PLAIN, *tails))
    for name, solver in SOLVERS.items():
        assert name in (coefficients._DYNAMICS if solver.start is None else coefficients.MULTISTEP)
        assert solver.start is None or SOLVERS[solver.start].start is None, "a chain starts with a solver of one step"


def test_history_reaches_back_over_steps_of_one_solver():
    names = ["dpmpp_2m", "dpmpp_2m", "flow_sde", "ode", "dpmpp_2m", "dpmpp_2m", "dpmpp_2m"]
    assert history(names) == [False, True, False, False, False, True, True, False]


def test_steps_say_what_they_take_and_leave():
    steps = make_plan(recipe_with({**mix_window(), "steps": 12, **TAIL}), 0).steps
    tail = [step for step in steps if step.solver == "dpmpp_2m"]
    assert [step.coefficients for step in tail] == ["ode"] + ["dpmpp_2m"] * (len(tail) - 1)
    assert [step.takes_estimate for step in tail] == [False] + [True] * (len(tail) - 1)
    assert [step.leaves_estimate for step in tail] == [True] * (len(tail) - 1) + [False]
    assert not any(step.takes_estimate or step.leaves_estimate for step in steps if step not in tail)
    assert [step.coefficients for step in steps if step.stochastic] == ["flow_sde"] * 2


@pytest.mark.parametrize("twin", ["flow_sde", "dpmpp_2m"])
def test_another_row_is_another_solver(twin, monkeypatch):
    """A row with a name of its own, and the coefficients of a known solver, rolls out as that one does."""
    recipe = small_recipe(rollout={"steps": 8, **TAIL})
    expected = rolled(recipe)
    table = coefficients._DYNAMICS if SOLVERS[twin].start is None else coefficients.MULTISTEP
    monkeypatch.setitem(SOLVERS, "another", Solver(*SOLVERS[twin]))
    monkeypatch.setitem(table, "another", table[twin])
    levels = planner._levels

    def renamed(*given):
        return [level._replace(solver="another") if level.solver == twin else level for level in levels(*given)]

    monkeypatch.setattr(planner, "_levels", renamed)
    assert "another" in {step.solver for step in make_plan(recipe, 0).steps}
    assert torch.equal(rolled(recipe), expected)


def rolled(recipe):
    plan, _ = plan_and_coefficients(recipe)
    policy = policy_of()
    forest = rollout(plan, plan_coefficients(plan), policy, encoded(policy), runner_of(policy), seed=1, iteration=0)
    return forest.leaves
