"""How long the runs of a comparison train: by iterations, by weighted passes counted beforehand, by seconds."""

import math
from pathlib import Path

import pytest

from engine_cases import tiny_recipe
from flowgrove.compare.goal import Goal, passes_before, planned_iterations, seconds_before
from flowgrove.errors import UserError
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup

RECIPES = Path(__file__).parents[2] / "recipes"


def lines(*costs, seconds=2.0):
    """Metrics lines of iterations of so many forwards and train passes."""
    return [
        {
            "iteration": number,
            "rollout_forwards": forwards,
            "train_passes": trained,
            "seconds": {"a": seconds, "b": 1.0},
        }
        for number, (forwards, trained) in enumerate(costs)
    ]


@pytest.fixture
def setup(tmp_path):
    return Setup(load_recipe(tiny_recipe(tmp_path)))


def test_a_train_pass_counts_as_three_forwards():
    assert passes_before([]) == [0]
    assert passes_before(lines((10, 4), (7, 1))) == [0, 22, 32]


def test_seconds_that_measure_the_gradient_are_not_charged():
    told = lines((1, 1), (1, 1))
    told[0]["seconds"]["gradient_noise"] = 100.0
    assert seconds_before(told) == [0, 3, 6]
    assert Goal("seconds", 12.0).spent(told) == 6


@pytest.mark.parametrize("name", ["shapes_mix", "shapes_branch", "shapes_flow_fast"])
@pytest.mark.parametrize("share", [True, False])
def test_planned_iterations_are_the_first_whose_plans_add_up_to_the_cost(name, share):
    """Windows and pruned depths move: every iteration is planned by itself here."""
    setup = Setup(load_recipe(RECIPES / f"{name}.yaml", (f"engine.share={str(share).lower()}", "run.seed=3")))
    spent, ends = 0, []
    for iteration in range(40):
        counts = setup.plan(iteration).counts
        pair = (
            (counts.rollout_forwards, counts.train_passes)
            if share
            else (counts.unshared_rollout_forwards, counts.unshared_train_passes)
        )
        spent += 12 * (pair[0] + 3 * pair[1])
        ends.append(spent)
    for iteration in (0, 7, 23, 39):
        assert planned_iterations(setup, ends[iteration]) == iteration + 1


def test_planned_iterations_follow_the_window(setup):
    """Its costs are not the first iteration's: that times a number of iterations is another cost."""
    counts = [setup.plan(iteration).counts for iteration in range(3)]
    costs = [2 * (one.rollout_forwards + 3 * one.train_passes) for one in counts]
    assert len(set(costs)) > 1
    assert planned_iterations(setup, sum(costs)) == 3
    assert planned_iterations(setup, sum(costs) + 1) == 4


def test_a_run_has_two_evaluations_however_little_it_may_cost(setup):
    assert planned_iterations(setup, 1) == 1
    assert Goal("weighted_passes", 1.0).iterations(setup, []) == 2


def test_a_cost_that_no_run_reaches_is_an_error(setup, monkeypatch):
    monkeypatch.setattr("flowgrove.compare.goal._MOST", 5)
    with pytest.raises(UserError, match="--cost 1,000,000 takes more than 5 iterations"):
        planned_iterations(setup, 1e6)


def test_a_goal_in_iterations_is_its_own_or_the_recipes(setup):
    for amount, wanted in ((None, 3), (7, 7)):
        goal = Goal("iterations", amount)
        assert goal.iterations(setup, []) == wanted
        assert goal.share(setup, lines((1, 1))) == pytest.approx(1 / wanted)
        assert goal.share(setup, lines(*[(1, 1)] * wanted)) == 1
        assert goal.iterations(setup, lines(*[(1, 1)] * 9)) == 9, "a longer run stays as it is"


def test_a_run_whose_edges_cost_less_than_planned_goes_on(setup):
    goal = Goal("weighted_passes", 600.0)
    planned = goal.iterations(setup, [])
    assert planned == planned_iterations(setup, 600)
    short = lines(*[(10, 10)] * planned)  # 40 an iteration
    assert goal.share(setup, short) == pytest.approx(planned * 40 / 600)
    assert goal.iterations(setup, short) == 15
    assert goal.iterations(setup, short[:2]) == planned, "one that was interrupted trains to what was planned"
    assert goal.share(setup, lines(*[(10, 10)] * 15)) == 1


def test_a_run_with_seconds_looks_at_what_iterations_take(setup):
    goal = Goal("seconds", 20.0)
    first = goal.iterations(setup, [])
    assert first == 2
    assert goal.iterations(setup, lines((1, 1), (1, 1))) == math.ceil(20 / 3)
    assert goal.spent(lines((1, 1), (1, 1))) == 6
    assert goal.iterations(setup, lines(*[(1, 1)] * 7)) == 7
