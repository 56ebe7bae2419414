"""What splits explain: variance components against a simulation that knows them and against plain loops, and what a
run chooses by them.
"""

import json

import numpy as np
import pytest

from flowgrove.errors import UserError
from flowgrove.plan.planner import make_plan
from flowgrove.plan.split_search import SplitSearch
from flowgrove.recipe.loading import parse_recipe
from flowgrove.split_evidence import SplitEvidence, variance_components
from planner_cases import recipe_content


def simulated(generator, prompts, fanouts, deviations, factors=((1.0,),)):
    """[prompts, leaves, rewards]: a leaf is the sum of what every edge on its way adds, N(0, deviation²) each time,
    and every reward `factors`[split] times that.
    """
    total = np.zeros((prompts, 1, len(factors[0])))
    for place, (fanout, deviation) in enumerate(zip(fanouts, deviations, strict=True)):
        total = np.repeat(total, fanout, axis=1)
        noise = deviation * generator.standard_normal((*total.shape[:2], 1))
        total = total + noise * np.array(factors[place % len(factors)])
    return total + 10 * generator.standard_normal((prompts, 1, 1))  # what a prompt is worth


@pytest.mark.parametrize(
    ("fanouts", "deviations"),
    [([2, 2, 2, 2], [0.5, 1.0, 0.0, 0.3]), ([4, 4], [1.0, 0.2]), ([3, 2, 4], [0.1, 0.7, 0.4]), ([12], [0.6])],
)
def test_components_are_unbiased(fanouts, deviations):
    scores = simulated(np.random.default_rng(3), 20_000, fanouts, deviations)
    found = variance_components(scores, fanouts)[..., 0, 0]
    error = found.std(1) / np.sqrt(found.shape[1])
    assert np.all(np.abs(found.mean(1) - np.square(deviations)) < 4 * error + 1e-12)
    assert len(fanouts) == 1 or (found < 0).any()  # an estimate that is cut off at 0 would be biased


def test_components_of_several_rewards_are_covariances():
    factors = ((1.0, 0.0), (1.0, -2.0))
    scores = simulated(np.random.default_rng(4), 20_000, [2, 4], [0.8, 0.5], factors)
    found = variance_components(scores, [2, 4])
    error = 4 * found.std(1) / np.sqrt(20_000)
    assert np.all(np.abs(found[0].mean(0) - 0.64 * np.outer(factors[0], factors[0])) < error[0] + 1e-12)
    assert np.all(np.abs(found[1].mean(0) - 0.25 * np.outer(factors[1], factors[1])) < error[1] + 1e-12)


def looped(rewards, fanouts):
    """The same of one prompt and reward, node by node."""

    def mean_squares(level):
        below, parents = int(np.prod(fanouts[level:])), len(rewards) // int(np.prod(fanouts[level:]))
        found = []
        for parent in range(parents):
            leaves = rewards[parent * below : (parent + 1) * below]
            each = below // fanouts[level]
            means = [sum(leaves[child * each : (child + 1) * each]) / each for child in range(fanouts[level])]
            middle = sum(means) / len(means)
            found.append(sum((one - middle) ** 2 for one in means) / (len(means) - 1))
        return sum(found) / parents

    squares = [mean_squares(level) for level in range(len(fanouts))] + [0.0]
    return [squares[level] - squares[level + 1] / ([*fanouts, 1][level + 1]) for level in range(len(fanouts))]


@pytest.mark.parametrize(("fanouts", "roots"), [([2, 2, 2], 1), ([3, 2], 1), ([2, 4, 3], 1), ([2, 2], 3)])
def test_components_are_those_of_plain_loops(fanouts, roots):
    scores = np.random.default_rng(5).random((4, roots * int(np.prod(fanouts)), 1))
    found = variance_components(scores, fanouts)[..., 0, 0]
    for prompt in range(4):
        assert found[:, prompt] == pytest.approx(looped(scores[prompt, :, 0].tolist(), fanouts), rel=1e-12)


TREE = {"splits": "auto", "fanout": 2, "probe": 6}


def recipe_of(credit=None, weights=(1.0,), **tree):
    rollout = {"steps": 9, "group_size": 8, "window": {"strategy": "none"}, "tree": {**TREE, **tree}}
    recipe = parse_recipe(recipe_content(rollout=rollout, credit=credit or {}, update={"updates_per_iteration": 1}))
    return recipe, SplitEvidence(SplitSearch.of(recipe), recipe.credit, list(weights))


def probe(recipe, evidence, scores_of, iterations=6):
    for iteration in range(iterations):
        plan = make_plan(recipe, iteration)
        evidence.add(plan, scores_of([step.index for step in plan.steps if step.fanout > 1]))
    return evidence


def in_turn(scores):
    left = iter(scores)
    return lambda splits: next(left)


def by_step(deviations, seed=0, prompts=400):
    generator = np.random.default_rng(seed)
    return lambda splits: simulated(generator, prompts, [2] * len(splits), [deviations[step] for step in splits])


DEVIATIONS = [0.1, 0.2, 1.0, 0.1, 0.7, 0.1, 0.9, 0.1]


def test_the_chosen_splits_explain_most_of_the_variance():
    recipe, evidence = recipe_of(forwards=60)
    assert evidence.chosen is None
    probe(recipe, evidence, by_step(DEVIATIONS))
    assert evidence.chosen == (2, 4, 6)
    assert evidence.search.forwards((2, 4, 6)) <= 60
    shares = evidence.shares()
    assert list(shares) == list(range(8))
    relative = np.array(list(shares.values())) / shares[2]
    assert relative == pytest.approx(np.square(DEVIATIONS), abs=0.06)
    assert evidence.splits(6) == (2, 4, 6)
    assert evidence.splits(5) == evidence.search.probing[5]


def test_shares_of_a_tree_sum_to_one():
    recipe, evidence = recipe_of(probe=1)
    probe(recipe, evidence, by_step(DEVIATIONS), 1)
    assert sum(evidence.shares().values()) == pytest.approx(1, rel=1e-12)


def test_what_is_dear_is_left_where_the_budget_does_not_reach():
    recipe, evidence = recipe_of(forwards=29)
    probe(recipe, evidence, by_step(DEVIATIONS))
    assert evidence.search.forwards((2, 4, 6)) > 29 >= evidence.search.forwards(evidence.chosen)
    assert evidence.chosen != (2, 4, 6)
    weights = {step: value**2 for step, value in enumerate(DEVIATIONS)}
    assert sum(weights[step] for step in evidence.chosen) > 1.4


@pytest.mark.parametrize("credit", [{}, {"normalise": "weighted_sum"}])
def test_rewards_count_as_they_do_in_the_advantages(credit):
    """The second reward is a hundred times as large and decided by other steps."""
    loud = dict(enumerate([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    soft = dict(enumerate([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]))
    recipe, evidence = recipe_of(credit=credit, weights=(1.0, 0.05), forwards=60)
    one, other = by_step(soft, 1), by_step(loud, 2)
    probe(recipe, evidence, lambda splits: np.concatenate([one(splits), 100 * other(splits)], axis=2))
    assert evidence.chosen == ((2, 4, 6) if not credit else (3, 5, 7))


def test_without_a_difference_in_reward_the_tree_that_stands_in_stays():
    recipe, evidence = recipe_of()
    probe(recipe, evidence, lambda splits: np.ones((3, 8, 1)))
    assert evidence.shares() == {}
    assert evidence.chosen == evidence.search.dear


def test_prompts_that_are_not_scored_do_not_enter():
    recipe, whole = recipe_of()
    _, part = recipe_of()
    scores = [np.random.default_rng(number).random((3, 8, 1)) for number in range(6)]
    probe(recipe, whole, in_turn(scores))
    spoilt = [np.concatenate([np.full((1, 8, 1), np.nan), one]) for one in scores]
    probe(recipe, part, in_turn(spoilt))
    assert part.state() == whole.state()


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_what_a_checkpoint_keeps_goes_on_to_the_last_bit(cut):
    draw = [np.random.default_rng(number).random((3, 8, 1)) for number in range(6)]
    recipe, whole = recipe_of()
    probe(recipe, whole, in_turn(draw))
    _, first = recipe_of()
    probe(recipe, first, in_turn(draw), cut)
    _, second = recipe_of()
    second.restore(json.loads(json.dumps(first.state())), cut)
    for iteration in range(cut, 6):
        second.add(make_plan(recipe, iteration), draw[iteration])
    assert second.state() == whole.state()
    assert second.chosen == whole.chosen
    assert json.loads(json.dumps(second.told())) == whole.told()


@pytest.mark.parametrize("change", [{"forwards": 40}, {"probe": 5}, {"fanout": 8}])
def test_the_state_of_another_tree_is_refused(change):
    recipe, written = recipe_of()
    probe(recipe, written, by_step(DEVIATIONS), 2)
    _, other = recipe_of(**change)
    for state, completed in ((written.state(), 2), (None, 2), ({}, 9)):
        with pytest.raises(UserError, match=r"rollout\.tree\.splits is auto.*write the splits") as caught:
            other.restore(state, completed)
        assert "\n" not in str(caught.value)
    other.restore(None, 0)
    assert other.probed == 0


def test_a_state_of_another_iteration_is_refused():
    recipe, written = recipe_of()
    probe(recipe, written, by_step(DEVIATIONS), 2)
    with pytest.raises(UserError, match="checkpoint of 3 iterations"):
        recipe_of()[1].restore(written.state(), 3)
