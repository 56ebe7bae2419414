"""Plans: what every step does and what it costs (DESIGN §3.2, MATH §1, §4 and §5),
against forests of explicit nodes.
"""

import collections
import dataclasses
import itertools
import math
import random
from decimal import ROUND_HALF_UP, Decimal

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import listed_sigmas
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.windows import window_steps
from planner_cases import (
    better_children,
    branch_tree,
    fanouts_by_the_book,
    forest_of,
    four_counts,
    grow,
    mix_window,
    recipe_content,
    recipe_with,
    recipes,
    stochastic_steps,
    train_by_hand,
    trained_steps,
    user_error,
    widths,
)

TREE_MIX = {"window": {"strategy": "frozen", "size": 4}}
TAIL = {"tail": {"solver": "dpmpp_2m", "compress": 0.4}}


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        (branch_tree(), (203, 218, 202, 187)),
        (branch_tree(**TREE_MIX), (203, 218, 34, 19)),
        (branch_tree(**TREE_MIX, **TAIL), (107, 122, 34, 19)),
    ],
    ids=["tree", "tree-mix", "tree-mix with tail"],
)
def test_math_5_trees(rollout, expected):
    counts = make_plan(recipe_with(rollout), 0).counts
    assert four_counts(counts) == expected
    assert counts.leaves == 16
    assert counts.unshared_train_passes == counts.trained_edges == expected[2]


def test_the_levels_of_the_published_tree():
    assert widths(make_plan(recipe_with(branch_tree()), 0)) == [1, 2, 2, 2, 4, 4, 4, 8, 8, 8] + [16] * 10
    mix = make_plan(recipe_with(branch_tree(**TREE_MIX, **TAIL)), 0)
    assert widths(mix) == [1, 2, 2, 2, 4, 4, 4, 8, 8, 8] + [16] * 4
    assert stochastic_steps(mix) == trained_steps(mix) == [0, 1, 2, 3, 6, 9]


@pytest.mark.parametrize("at", range(21))
@pytest.mark.parametrize(
    ("updates", "partition", "passes"), [(1, "trajectories", 37), (4, "trajectories", 40), (4, "parents", 37)]
)
def test_math_5_flat_group_at_every_window_position(at, updates, partition, passes):
    recipe = recipe_with(mix_window(), updates=updates, partition=partition)
    for iteration in (25 * at, 25 * at + 24, 25 * (at + 21)):
        plan = make_plan(recipe, iteration)
        assert plan.window == (at, at + 1, at + 2, at + 3)
        assert widths(plan) == [1] * (at + 1) + [12] * (24 - at)
        assert four_counts(plan.counts) == (at + 1 + 12 * (24 - at), 12 * 25 - 11 * at, 48, passes)
        assert (plan.counts.leaves, plan.counts.unshared_rollout_forwards, plan.counts.unshared_train_passes) == (
            12,
            300,
            48,
        )


@pytest.mark.parametrize(
    ("tail", "unshared"),
    [({}, 16 * 20), (TAIL, 16 * 14)],
    ids=["whole schedule", "with tail"],
)
def test_unshared_forwards_are_leaves_times_the_plans_own_steps(tail, unshared):
    assert make_plan(recipe_with(branch_tree(**TREE_MIX, **tail)), 0).counts.unshared_rollout_forwards == unshared


@pytest.mark.parametrize(
    ("partition", "passes"), [("trajectories", 2 + 2 + 2 + 4 + 4 + 4 + 4 + 8 + 8 + 8 + 9 * 16), ("parents", 187)]
)
def test_a_tree_in_four_updates_splits_a_node_only_where_its_children_train_in_different_updates(partition, passes):
    plan = make_plan(recipe_with(branch_tree(), updates=4, partition=partition), 0)
    assert four_counts(plan.counts) == (203, 218, 202, passes)


def test_groups_that_share_no_noise_share_no_state():
    flat = make_plan(recipe_with({**mix_window(), "shared_initial_noise": False}, updates=4), 25 * 9)
    assert widths(flat) == [12] * 25
    assert four_counts(flat.counts) == (300, 300, 48, 48)
    trees = make_plan(recipe_with(branch_tree(group_size=48, shared_initial_noise=False)), 0)
    assert trees.roots == 3
    assert four_counts(trees.counts) == (3 * 203, 3 * 218, 3 * 202, 3 * 187)


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_steps_are_a_chain_from_noise_to_picture(recipe, iteration):
    plan = make_plan(recipe, iteration)
    steps = plan.steps
    assert [step.index for step in steps] == list(range(len(steps)))
    assert (steps[0].sigma, steps[-1].sigma_next) == (1.0, 0.0)
    assert all(step.sigma_next < step.sigma for step in steps)
    assert all(after.sigma == before.sigma_next for before, after in itertools.pairwise(steps))
    assert (steps[-1].stochastic, steps[-1].trained) == (False, False)


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_stochastic_steps_are_the_window_and_the_splits(recipe, iteration):
    plan = make_plan(recipe, iteration)
    window = window_steps(recipe.rollout.window, recipe.rollout.steps, iteration, recipe.run.seed)
    assert plan.window == tuple(window)
    assert stochastic_steps(plan) == sorted({*window, *(recipe.rollout.tree.splits if recipe.rollout.tree else ())})
    assert set(trained_steps(plan)) <= set(stochastic_steps(plan))
    if recipe.credit.prune is None or recipe.credit.prune.kind != "depth":
        assert trained_steps(plan) == stochastic_steps(plan)


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_levels_follow_the_fanouts_and_end_in_the_group(recipe, iteration):
    plan = make_plan(recipe, iteration)
    roots, fanouts = fanouts_by_the_book(recipe.rollout, plan.window, len(plan.steps))
    levels = grow(roots, fanouts)
    assert [(step.nodes_in, step.fanout, step.nodes_out) for step in plan.steps] == [
        (len(level), fanout, len(below)) for level, fanout, below in zip(levels, fanouts, levels[1:], strict=False)
    ]
    assert plan.leaves == plan.counts.leaves == len(levels[-1]) == recipe.rollout.group_size


@settings(max_examples=120)
@given(recipes(), st.integers(0, 200))
def test_counts_are_those_of_a_forest_built_node_by_node(recipe, iteration):
    plan = make_plan(recipe, iteration)
    roots, fanouts = fanouts_by_the_book(recipe.rollout, plan.window, len(plan.steps))
    levels = grow(roots, fanouts)
    kept = None
    if recipe.credit.prune and recipe.credit.prune.kind == "parent_top1" and max(fanouts) > 1:
        last_split = max(step for step, fanout in enumerate(fanouts) if fanout > 1)
        kept = better_children(levels, last_split, lambda parent: 0)
    edges, passes = train_by_hand(
        levels,
        trained_steps(plan),
        plan.update_of_leaf,
        keep_siblings=recipe.update.partition == "parents",
        selected=plan.selected_steps(0),
        kept_leaves=kept,
    )
    assert plan.counts.rollout_forwards == sum(len(level) for level in levels[:-1])
    assert plan.counts.edges == sum(len(level) for level in levels[1:])
    assert (plan.counts.trained_edges, plan.counts.train_passes) == (len(edges), passes)
    assert plan.counts.unshared_rollout_forwards == len(levels[-1]) * len(plan.steps)
    assert plan.counts.unshared_train_passes == len(edges)


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200), st.data())
def test_kept_edges_lie_on_the_trajectories_of_kept_leaves(recipe, iteration, data):
    plan = make_plan(recipe, iteration)
    prompt = data.draw(st.integers(0, 5))
    kept = data.draw(st.sets(st.integers(0, plan.leaves - 1)))
    edges, _ = train_by_hand(
        forest_of(plan),
        trained_steps(plan),
        plan.update_of_leaf,
        selected=plan.selected_steps(prompt),
        kept_leaves=kept,
    )
    told = {step.index: plan.kept_edges(step, prompt, kept.__contains__) for step in plan.trained_steps}
    assert list(told) == trained_steps(plan)
    assert {(step, child) for step, trains in told.items() for child, train in enumerate(trains) if train} == edges


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_every_update_has_its_share_of_the_leaves(recipe, iteration):
    plan = make_plan(recipe, iteration)
    updates = [plan.update_of_leaf(leaf) for leaf in range(plan.leaves)]
    assert updates == sorted(updates)
    sizes = [updates.count(update) for update in range(recipe.update.updates_per_iteration)]
    assert sum(sizes) == plan.leaves
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_an_edge_trains_in_the_update_of_its_first_leaf_and_parents_keeps_siblings_together(recipe, iteration):
    plan = make_plan(recipe, iteration)
    for step in plan.steps:
        below = plan.leaves // step.nodes_out
        updates = [plan.update_of_edge(step, child) for child in range(step.nodes_out)]
        leaders = [
            child - child % step.fanout if recipe.update.partition == "parents" else child
            for child in range(step.nodes_out)
        ]
        assert updates == [plan.update_of_leaf(leader * below) for leader in leaders]


@pytest.mark.parametrize(("rollout", "updates"), [(branch_tree(), 34), (branch_tree(**TREE_MIX), 6)])
def test_branchgrpos_code_steps_after_six_edges_of_each_tree(rollout, updates):
    """12 edges of two trees: 34 steps an iteration, 6 with a window."""
    plan = make_plan(recipe_with(rollout, edges_per_update=6), 0)
    drawn = collections.Counter(
        plan.update_of_edge(step, child) for step in plan.trained_steps for child in range(step.nodes_out)
    )
    assert plan.updates == updates
    edges = plan.counts.trained_edges
    assert [drawn[update] for update in range(updates)] == [6] * (updates - 1) + [edges - 6 * (updates - 1)]


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200), st.integers(1, 40))
@example(recipe_with(mix_window(), partition="parents"), 0, 6)
@example(recipe_with(branch_tree(**TREE_MIX), partition="parents"), 0, 1)
def test_drawn_updates_hold_as_many_edges_as_the_recipe_says(recipe, iteration, edges):
    update = recipe.update.model_copy(update={"edges_per_update": edges})
    plan = make_plan(recipe.model_copy(update={"update": update}), iteration)
    units = {}  # of every update, its edges as (step, child, how many share its draw)
    for step in plan.trained_steps:
        together = step.fanout if update.partition == "parents" else 1
        for child in range(step.nodes_out):
            units.setdefault(plan.update_of_edge(step, child), []).append((step.index, child // together, together))
    assert sorted(units) == list(range(plan.updates)) or (not units and plan.updates == 1)
    sizes = [len(units[update]) for update in sorted(units)]
    largest = max((together for each in units.values() for *_, together in each), default=1)
    assert sum(sizes) == sum(step.nodes_out for step in plan.trained_steps)
    assert all(0 <= size - edges < largest for size in sizes[:-1])
    for each in units.values():  # siblings that are drawn together stay together
        assert all(each.count(unit) == unit[2] for unit in each)
    assert plan.counts.trained_edges == make_plan(recipe, iteration).counts.trained_edges
    assert plan.counts.train_passes == sum(states for _, states in plan.trained_by_update)
    idle = [step for step in plan.steps if not step.trained]  # pruned ones are drawn in a forest too
    assert all(plan.update_of_edge(step, child) == 0 for step in idle for child in range(step.nodes_out))


def test_edges_are_drawn_anew_in_every_iteration():
    recipe = recipe_with(branch_tree(), edges_per_update=6)
    plans = [make_plan(recipe, iteration) for iteration in (0, 0, 1)]
    first, again, second = (
        [[plan.update_of_edge(step, child) for child in range(step.nodes_out)] for step in plan.trained_steps]
        for plan in plans
    )
    assert first == again != second
    assert len(set(first[-1])) > 5, "the edges of a step are spread over the updates"


@settings(max_examples=50)
@given(recipes(), st.integers(0, 200))
def test_a_plan_is_a_pure_function_of_recipe_and_iteration(recipe, iteration):
    plan = make_plan(recipe, iteration)
    chosen = [plan.selected_steps(prompt) for prompt in range(3)]
    random.seed(iteration)
    numpy.random.seed(0)
    torch.manual_seed(0)
    make_plan(recipe, iteration + 1).selected_steps(0)
    again = make_plan(parse_recipe(recipe.model_dump()), iteration)
    assert again == plan
    assert again.counts == plan.counts
    assert [again.selected_steps(prompt) for prompt in range(3)] == chosen


def test_plans_hold_numbers_not_tensors():
    plan = make_plan(recipe_with(branch_tree(**TAIL)), 0)
    values = [value for step in plan.steps for value in dataclasses.astuple(step)]
    assert {type(value) for value in values} == {int, float, str, bool, type(None)}


def test_siblings_of_a_tree_correlate_as_the_recipe_says_and_flat_groups_do_not():
    tree = {"splits": [0, 3, 6, 9], "fanout": 2}
    assert make_plan(recipe_with(branch_tree()), 0).sibling_correlation == 0.0588 == pytest.approx(1 / 17, abs=5e-5)
    assert make_plan(recipe_with(branch_tree(tree={**tree, "sibling_correlation": 0.3})), 0).sibling_correlation == 0.3
    assert make_plan(recipe_with(mix_window()), 0).sibling_correlation == 0.0


def quadratic_table(steps):
    """A foreign table: (1 - i/T)² is not a shifted one."""
    return [(1 - i / steps) ** 2 for i in range(steps)] + [0.0]


@settings(max_examples=50)
@given(recipes(prunes=st.none()), st.integers(0, 200))
def test_a_tail_is_uniform_before_the_shift_and_ends_at_0(recipe, iteration):
    rollout, plan = recipe.rollout, make_plan(recipe, iteration)
    head = max(stochastic_steps(plan), default=-1) + 1
    remaining = rollout.steps - head
    count = (
        remaining
        if rollout.tail is None
        else max(1, int((remaining * Decimal(str(rollout.tail.compress))).quantize(Decimal(1), ROUND_HALF_UP)))
    )
    times = [1 - i / rollout.steps for i in range(head)] + [
        (1 - head / rollout.steps) * (1 - j / count) for j in range(count)
    ]
    assert len(plan.steps) == head + count
    assert [step.sigma for step in plan.steps] == pytest.approx(
        [rollout.shift * t / (1 + (rollout.shift - 1) * t) for t in times], rel=1e-12
    )
    assert plan.steps[-1].sigma_next == 0.0
    assert [step.solver for step in plan.steps[head:]] == ["dpmpp_2m" if rollout.tail else "ode"] * count
    assert all(step.solver == "ode" for step in plan.steps[:head] if not step.stochastic)


@pytest.mark.parametrize(
    ("steps", "head", "compress", "count"),
    [
        (20, 10, 0.4, 4),
        (10, 5, 0.1, 1),
        (10, 5, 0.3, 2),
        (10, 5, 0.5, 3),
        (10, 5, 0.01, 1),
        (10, 5, 1.0, 5),
        (10, 9, 0.2, 1),
        (10, 9, 1.0, 1),
        (50, 5, 0.7, 32),
        (30, 5, 0.58, 15),
        (60, 10, 0.29, 15),
    ],
)
def test_a_tail_has_remaining_times_compress_steps_rounded_half_up(steps, head, compress, count):
    rollout = {
        "steps": steps,
        "window": {"strategy": "frozen", "size": 1, "start": head - 1},
        "tail": {"compress": compress},
    }
    assert len(make_plan(recipe_with(rollout), 0).steps) == head + count


@pytest.mark.parametrize("iteration", [0, 25, 100, 25 * 20])
def test_mistake_4_a_tail_reaches_0_wherever_the_window_stands(iteration):
    for compress in (0.05, 0.2, 0.4, 0.77, 1.0):
        steps = make_plan(recipe_with({**mix_window(), "tail": {"compress": compress}}), iteration).steps
        assert steps[-1].sigma_next == 0.0
        assert steps[-1].solver == "dpmpp_2m"
        assert len(steps) <= 25


@pytest.mark.parametrize("compress", [0.15, 0.4, 0.5, 1.0])
def test_a_tail_of_a_foreign_table_is_linear_over_its_index(compress):
    values = quadratic_table(25)
    recipe = recipe_with({**mix_window(), "shift": None, "tail": {"compress": compress}})
    plan = make_plan(recipe, 25 * 6, listed_sigmas(values))
    count = max(1, math.floor(15 * compress + 0.5))
    positions = [*range(10), *numpy.linspace(10, 25, count + 1)]
    told = [plan.steps[0].sigma, *(step.sigma_next for step in plan.steps)]
    assert told == pytest.approx(numpy.interp(positions, range(26), values), rel=1e-12, abs=0)
    assert told[-1] == 0.0
    assert plan.sigma_max == values[1]


def test_sigma_max_is_the_second_entry_of_the_uncompressed_table():
    no_window = {"window": {"strategy": "none"}, "shared_initial_noise": False}
    for rollout in ({}, TAIL, {**TAIL, "window": {"strategy": "frozen", "size": 1}}, {**TAIL, **no_window}):
        plan = make_plan(recipe_with({"steps": 25, "shift": 3.0, **rollout}), 0)
        assert plan.sigma_max == pytest.approx(3 * 0.96 / (0.04 + 3 * 0.96), rel=1e-14)


def test_step_fraction_1_trains_every_sample_on_every_trained_step():
    plan = make_plan(recipe_with(branch_tree(**TREE_MIX)), 0)
    assert [set(steps) for steps in plan.selected_steps(3)] == [{0, 1, 2, 3, 6, 9}] * 16


@pytest.mark.parametrize("fraction", [0.6, 0.5, 0.25, 0.01])
def test_step_fraction_gives_every_sample_its_own_share_of_the_steps(fraction):
    """DanceGRPO's published run trains 60 % of the steps."""
    plan = make_plan(recipe_with({"steps": 16, "group_size": 12}, step_fraction=fraction), 0)
    chosen = plan.selected_steps(0)
    sizes = {len(steps) for steps in chosen}
    assert len(chosen) == 12
    assert len(sizes) == 1
    share = sizes.pop()
    assert share >= 1
    assert share == 1 or abs(share - 15 * fraction) < 1
    assert all(steps <= set(range(15)) for steps in chosen)
    assert len(set(chosen)) > 3
    assert plan.counts.trained_edges == plan.counts.unshared_train_passes == 12 * share
    assert sum(sum(plan.kept_edges(step, 0)) for step in plan.trained_steps) == 12 * share


def test_step_fraction_is_drawn_from_seed_iteration_and_prompt():
    rollout = {"steps": 16, "group_size": 12}
    plan = make_plan(recipe_with(rollout, step_fraction=0.5), 3)
    base = plan.selected_steps(0)
    assert make_plan(recipe_with(rollout, step_fraction=0.5), 3).selected_steps(0) == base
    assert plan.selected_steps(1) != base
    assert make_plan(recipe_with(rollout, step_fraction=0.5), 4).selected_steps(0) != base
    assert make_plan(recipe_with(rollout, step_fraction=0.5, seed=43), 3).selected_steps(0) != base


def test_step_fraction_leaves_the_rollout_alone():
    whole, part = (make_plan(recipe_with(branch_tree(), step_fraction=fraction), 0) for fraction in (1.0, 0.5))
    assert part.steps == whole.steps
    assert part.counts.rollout_forwards == 203
    assert part.counts.trained_edges < whole.counts.trained_edges


@pytest.mark.parametrize("group_size", [12, 15, 17, 32, 1])
def test_a_group_that_does_not_match_the_tree_is_an_error_that_names_key_and_number(group_size):
    text = user_error(make_plan, recipe_with(branch_tree(group_size=group_size)), 0)
    assert "rollout.group_size" in text
    assert "16" in text


def test_a_group_that_is_no_multiple_of_its_trees_is_an_error():
    text = user_error(make_plan, recipe_with(branch_tree(group_size=24, shared_initial_noise=False)), 0)
    assert "rollout.group_size" in text
    assert "16" in text


@pytest.mark.parametrize("split", [19, 20, 100])
def test_splits_at_the_last_step_or_past_it_are_an_error(split):
    tree = {"splits": [0, 3, 6, split], "fanout": 2}
    text = user_error(make_plan, recipe_with(branch_tree(tree=tree)), 0)
    assert "rollout.tree.splits" in text
    assert "18" in text


@pytest.mark.parametrize(
    ("rollout", "leaves"),
    [(mix_window(), 12), (branch_tree(), 16), ({**mix_window(), "shared_initial_noise": False}, 12)],
)
def test_more_updates_than_leaves_are_an_error(rollout, leaves):
    assert make_plan(recipe_with(rollout, updates=leaves), 0).updates == leaves
    text = user_error(make_plan, recipe_with(rollout, updates=leaves + 1), 0)
    assert "update.updates_per_iteration" in text
    assert str(leaves) in text


def test_shared_noise_without_a_stochastic_step_is_an_error():
    text = user_error(make_plan, recipe_with({"window": {"strategy": "none"}}), 0)
    assert "rollout.shared_initial_noise" in text
    assert "window" in text


def test_window_errors_surface_in_the_plan():
    assert "rollout.window.size" in user_error(
        make_plan, recipe_with({"steps": 4, "window": {"strategy": "progressive", "size": 4}}), 0
    )


def test_a_null_shift_needs_the_pipelines_table():
    recipe = recipe_with({"shift": None})
    assert "rollout.shift" in user_error(make_plan, recipe, 0)
    values = quadratic_table(25)
    assert [step.sigma for step in make_plan(recipe, 0, listed_sigmas(values)).steps] == values[:-1]


def test_the_default_rollout_can_be_planned():
    plan = make_plan(parse_recipe(recipe_content()), 0)
    assert stochastic_steps(plan) == list(range(24))
    assert four_counts(plan.counts) == (1 + 12 * 24, 12 * 25, 12 * 24, 4 + 12 * 23)
