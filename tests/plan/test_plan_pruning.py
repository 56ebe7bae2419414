"""Pruning takes edges from training, never from the rollout: MATH §4, against forests of explicit nodes."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrove.plan.planner import make_plan
from planner_cases import (
    better_children,
    branch_tree,
    forest_of,
    four_counts,
    recipe_with,
    recipes,
    stochastic_steps,
    train_by_hand,
    trained_steps,
)


@pytest.mark.parametrize(
    ("prune", "edges", "passes"),
    [
        ({"kind": "depth", "depths": 4, "first": 10, "stop": 19, "every": 30}, 202 - 4 * 16, 187 - 4 * 16),
        ({"kind": "depth", "depths": 3, "first": 0, "stop": 19, "every": 30}, 202 - 3 * 2, 187 - (1 + 2 + 2)),
        ({"kind": "parent_top1"}, 42 + 10 * 8, 35 + 8 + 9 * 8),
        ({"kind": "extreme", "keep": 4}, 42 + 10 * 8, 35 + 8 + 9 * 8),
        ({"kind": "extreme", "keep": 8}, 202, 187),
        ({"kind": "extreme", "keep": 100}, 202, 187),
    ],
)
def test_pruned_counts_of_the_published_tree(prune, edges, passes):
    plan = make_plan(recipe_with(branch_tree(), prune=prune), 0)
    assert four_counts(plan.counts) == (203, 218, edges, passes)
    assert stochastic_steps(plan) == list(range(19))


def pruned(prune, iteration):
    """Stochastic steps that depth pruning leaves out of training."""
    plan = make_plan(recipe_with(branch_tree(), prune={"kind": "depth", **prune}), iteration)
    return sorted(set(stochastic_steps(plan)) - set(trained_steps(plan)))


def test_the_pruned_depths_slide_by_one_every_so_many_iterations():
    prune = {"depths": 4, "first": 6, "stop": 15, "every": 30}
    assert pruned(prune, 0) == pruned(prune, 29) == [6, 7, 8, 9]
    assert pruned(prune, 30) == pruned(prune, 59) == [7, 8, 9, 10]
    assert pruned(prune, 60) == [8, 9, 10, 11]


def test_the_pruned_depths_stop_sliding_at_stop():
    late = pruned({"depths": 4, "first": 6, "stop": 15, "every": 30}, 30 * 1000)
    assert late == list(range(late[0], late[0] + 4))
    assert late[-1] in (14, 15)


def test_the_pruned_depths_slide_earlier_if_told_to():
    prune = {"depths": 2, "first": 8, "stop": 3, "every": 10, "direction": "earlier"}
    assert [pruned(prune, iteration) for iteration in (0, 9, 10, 20)] == [[8, 9], [8, 9], [7, 8], [6, 7]]
    assert pruned(prune, 10_000)[0] in (3, 4)


@pytest.mark.parametrize(("splits", "fanout"), [([0, 2, 5], 2), ([1, 3], 3), ([4], 4), ([0, 1], 2)])
@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("partition", ["trajectories", "parents"])
def test_parent_top1_counts_hold_whichever_child_is_better(splits, fanout, updates, partition):
    leaves = fanout ** len(splits)
    rollout = {"steps": 8, "group_size": leaves, "tree": {"splits": splits, "fanout": fanout}}
    plan = make_plan(recipe_with(rollout, updates=updates, partition=partition, prune={"kind": "parent_top1"}), 0)
    levels = forest_of(plan)
    for choose in (lambda _: 0, lambda _: fanout - 1, lambda parent: parent % fanout):
        kept = better_children(levels, splits[-1], choose)
        assert len(kept) == leaves // fanout
        edges, passes = train_by_hand(
            levels, range(7), plan.update_of_leaf, keep_siblings=partition == "parents", kept_leaves=kept
        )
        assert (plan.counts.trained_edges, plan.counts.train_passes) == (len(edges), passes)


def extreme_plan(rollout, keep, updates, partition):
    """The plan, and (trained edges, train passes) for every set of leaves that rewards could keep."""
    plan = make_plan(
        recipe_with(
            {"steps": 5, **rollout}, updates=updates, partition=partition, prune={"kind": "extreme", "keep": keep}
        ),
        0,
    )
    levels = forest_of(plan)
    outcomes = []
    for kept in itertools.combinations(range(plan.leaves), 2 * keep):
        edges, passes = train_by_hand(
            levels, range(4), plan.update_of_leaf, keep_siblings=partition == "parents", kept_leaves=set(kept)
        )
        outcomes.append((len(edges), passes))
    assert len(outcomes) >= 15
    return plan, outcomes


EIGHT_LEAVES = {"group_size": 8, "tree": {"splits": [0, 1, 3], "fanout": 2}}


@pytest.mark.parametrize(
    ("rollout", "keep", "updates"),
    [
        (EIGHT_LEAVES, 1, 1),
        (EIGHT_LEAVES, 2, 2),
        (EIGHT_LEAVES, 3, 4),
        ({"group_size": 9, "tree": {"splits": [1, 3], "fanout": 3}}, 2, 1),
        ({"group_size": 9, "tree": {"splits": [1, 3], "fanout": 3}}, 2, 3),
        ({"group_size": 8, "tree": {"splits": [0, 2], "fanout": 2}, "shared_initial_noise": False}, 1, 2),
        ({"group_size": 6}, 1, 1),
        ({"group_size": 6}, 1, 3),
        ({"group_size": 6, "shared_initial_noise": False}, 2, 2),
    ],
)
@pytest.mark.parametrize("partition", ["trajectories", "parents"])
def test_extreme_counts_are_the_most_that_any_rewards_can_keep(rollout, keep, updates, partition):
    plan, outcomes = extreme_plan(rollout, keep, updates, partition)
    assert (plan.counts.trained_edges, plan.counts.train_passes) == (
        max(edges for edges, _ in outcomes),
        max(passes for _, passes in outcomes),
    )


@pytest.mark.parametrize(
    ("rollout", "keep", "updates"),
    [(EIGHT_LEAVES, 3, 3), ({"group_size": 9, "tree": {"splits": [1, 3], "fanout": 3}}, 2, 4)],
)
def test_extreme_counts_of_unequal_updates_are_those_of_some_rewards_that_keep_the_most_edges(rollout, keep, updates):
    plan, outcomes = extreme_plan(rollout, keep, updates, "trajectories")
    assert plan.counts.trained_edges == max(edges for edges, _ in outcomes)
    assert (plan.counts.trained_edges, plan.counts.train_passes) in outcomes


@settings(max_examples=50)
@given(
    recipes(
        prunes=st.sampled_from([{"kind": "depth", "first": 1}, {"kind": "parent_top1"}, {"kind": "extreme", "keep": 1}])
    ),
    st.integers(0, 200),
)
def test_pruning_leaves_the_rollout_alone(recipe, iteration):
    plan = make_plan(recipe, iteration)
    unpruned = make_plan(
        recipe.model_copy(update={"credit": recipe.credit.model_copy(update={"prune": None})}), iteration
    )
    assert [dataclasses.replace(step, trained=step.stochastic) for step in plan.steps] == list(unpruned.steps)
    assert plan.counts.rollout_forwards == unpruned.counts.rollout_forwards
    assert plan.counts.edges == unpruned.counts.edges
    assert plan.counts.trained_edges <= unpruned.counts.trained_edges
    assert plan.counts.train_passes <= unpruned.counts.train_passes
