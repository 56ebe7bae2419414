"""Credit: MATH §4, against a slow implementation of it on explicit nodes with recursion,
that shares nothing with the arrays of the engine.
"""

import math
import statistics
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowgrove.credit import advantages, assign_credit, fused
from flowgrove.plan.planner import make_plan
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.schema import Credit
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout.forest import Forest, leaf_path_logp
from planner_cases import PRUNES, branch_tree, mix_window, recipe_content, recipe_with, recipes, user_error

# MATH §4 on explicit nodes


@dataclass(eq=False)
class Node:
    """A distinct state of one prompt's rollout. `number`: its place in its level."""

    depth: int
    number: int
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)

    def leaves(self):
        return [leaf for child in self.children for leaf in child.leaves()] if self.children else [self]


def roots_of(plan):
    """The forest of one prompt, grown by recursion; children are numbered K·parent + c."""

    def grow(depth, number, parent=None):
        node = Node(depth, number, parent)
        if depth < len(plan.steps):
            fanout = plan.steps[depth].fanout
            node.children = [grow(depth + 1, fanout * number + child, node) for child in range(fanout)]
        return node

    return [grow(0, number) for number in range(plan.roots)]


def nodes_at(roots, depth):
    if depth == 0:
        return list(roots)
    return [child for parent in nodes_at(roots, depth - 1) for child in parent.children]


def mean_reward(node, reward, path_logp, beta):
    """r̄(n) = Σ over leaves below n of softmax(β·path logp)·R."""
    below = [leaf.number for leaf in node.leaves()]
    highest = max(beta * path_logp[leaf] for leaf in below)
    shares = [math.exp(beta * path_logp[leaf] - highest) for leaf in below]
    return math.fsum(share * reward[leaf] for share, leaf in zip(shares, below, strict=True)) / math.fsum(shares)


def compared(node, roots, baseline):
    """(the ancestor of `node`, or itself, that has others beside it; all that it is compared with, itself included)."""
    if baseline == "depth":
        return node, nodes_at(roots, node.depth)
    while node.parent is not None and len(node.parent.children) == 1:
        node = node.parent
    return node, roots if node.parent is None else node.parent.children


def deviation(level, leaves, of_all, credit):
    """What divides the advantages of one prompt and depth, whose nodes have the values `level`."""
    if credit.std == "none":
        return 1.0
    if credit.std == "global":
        return statistics.stdev(of_all) + 1e-8
    if credit.std == "leaves":
        return statistics.stdev(leaves) + 1e-8
    k, n = credit.std_shrinkage, len(level)
    mixed = ((n - 1) * statistics.variance(level) + k * statistics.variance(leaves)) / (n - 1 + k)
    return math.sqrt(mixed) + 1e-8


def advantages_of_level(level, roots, fused_of, leaves, of_all, credit):
    """One reward's advantages of one prompt's nodes. fused_of: r̄ of a node; leaves: the reward of every leaf."""
    advantages = []
    for node in level:
        mine, group = compared(node, roots, credit.baseline)
        values = [fused_of(each) for each in group]
        if len(group) == 1 or max(values) - min(values) <= 1e-6:
            advantages.append(0.0)
            continue
        others = values if credit.baseline == "depth" else [fused_of(each) for each in group if each is not mine]
        difference = fused_of(node) - statistics.fmean(others)
        advantages.append(difference / deviation([fused_of(each) for each in level], leaves, of_all, credit))
    return advantages


def advantages_by_hand(plan, credit, scores, weights, path_logp):
    """Trained step → advantages, a list per prompt of a number per child."""
    prompts, roots = range(len(scores)), roots_of(plan)
    if credit.normalise == "weighted_sum":
        terms = [
            (1.0, [[sum(w * r for w, r in zip(weights, leaf, strict=True)) for leaf in scores[p]] for p in prompts])
        ]
    else:
        terms = [(weight, [[leaf[k] for leaf in scores[p]] for p in prompts]) for k, weight in enumerate(weights)]
    result = {}
    for step in plan.trained_steps:
        level = nodes_at(roots, step.index + 1)
        total = [[0.0] * len(level) for _ in prompts]
        for weight, reward in terms:
            of_all = [mean_reward(node, reward[p], path_logp[p], credit.fusion_beta) for p in prompts for node in level]
            for p in prompts:

                def fused_of(node, leaves=reward[p], logp=path_logp[p]):
                    return mean_reward(node, leaves, logp, credit.fusion_beta)

                advantages = advantages_of_level(level, roots, fused_of, reward[p], of_all, credit)
                total[p] = [before + weight * advantage for before, advantage in zip(total[p], advantages, strict=True)]
        result[step.index] = [[max(-credit.adv_clip, min(credit.adv_clip, value)) for value in row] for row in total]
    return result


def kept_leaves_by_hand(plan, credit, total, path_logp):
    """Numbers of one prompt's leaves that pruning by reward keeps. `total`: weighted rewards."""
    roots, prune = roots_of(plan), credit.prune
    everything = {leaf.number for root in roots for leaf in root.leaves()}
    if prune is None or prune.kind == "depth":
        return everything
    if prune.kind == "extreme":
        ranked = sorted(everything, key=lambda leaf: total[leaf])
        return set(ranked[: prune.keep]) | set(ranked[-prune.keep :])
    splits = [step.index for step in plan.steps if step.fanout > 1]
    if not splits:
        return everything

    def fused_reward(child):
        return mean_reward(child, total, path_logp, credit.fusion_beta)

    best = [max(parent.children, key=fused_reward) for parent in nodes_at(roots, splits[-1])]
    return {leaf.number for child in best for leaf in child.leaves()}


def trained_by_hand(plan, credit, scores, weights, path_logp, first_prompt):
    """Trained step → for each prompt and child, whether the edge trains:
    the step is among those of its first leaf, and a kept leaf is below it.
    """
    roots, result = roots_of(plan), {}
    for step in plan.trained_steps:
        rows = []
        for p in range(len(scores)):
            total = [sum(w * r for w, r in zip(weights, leaf, strict=True)) for leaf in scores[p]]
            kept, taken = kept_leaves_by_hand(plan, credit, total, path_logp[p]), plan.selected_steps(first_prompt + p)
            below = [[leaf.number for leaf in node.leaves()] for node in nodes_at(roots, step.index + 1)]
            rows.append([step.index in taken[min(leaves)] and not kept.isdisjoint(leaves) for leaves in below])
        result[step.index] = rows
    return result


def check(plan, credit, scores, weights, path_logp, first_prompt=0):
    found = assign_credit(plan, credit, scores, weights, path_logp, first_prompt)
    advantages = advantages_by_hand(plan, credit, scores.tolist(), weights, path_logp.tolist())
    trains = trained_by_hand(plan, credit, scores.tolist(), weights, path_logp.tolist(), first_prompt)
    assert list(found) == [step.index for step in plan.trained_steps]
    for step in plan.trained_steps:
        edges = found[step.index]
        assert edges.advantage.dtype == np.float64
        assert edges.advantage.shape == edges.trains.shape == (len(scores), step.nodes_out)
        np.testing.assert_allclose(edges.advantage, advantages[step.index], rtol=1e-9, atol=1e-9)
        assert (edges.advantage == 0).tolist() == (np.array(advantages[step.index]) == 0).tolist()
        assert edges.trains.tolist() == trains[step.index]
    return found


PRUNES_BY_REWARD = PRUNES | st.fixed_dictionaries({"kind": st.just("extreme"), "keep": st.integers(1, 4)})
STDS = [("group", 0.0), ("global", 0.0), ("leaves", 0.0), ("none", 0.0), ("group", 0.5), ("group", 8.0)]
WEIGHTS = st.lists(st.floats(0.1, 3.0), min_size=1, max_size=3)


def drawn_case(plan, weights, prompts, seed):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(prompts, plan.leaves, len(weights))) * random.uniform(0.01, 5) + random.normal()
    return scores, random.normal(size=(prompts, plan.leaves))


@settings(max_examples=150)
@given(
    recipe=recipes(PRUNES_BY_REWARD),
    iteration=st.integers(0, 20),
    weights=WEIGHTS,
    prompts=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    first_prompt=st.integers(0, 5),
    options=st.fixed_dictionaries(
        {
            "normalise": st.sampled_from(["per_reward", "weighted_sum"]),
            "baseline": st.sampled_from(["depth", "siblings"]),
            "std, std_shrinkage": st.sampled_from(STDS),
            "fusion_beta": st.sampled_from([0.0, 0.0, 0.7, -2.0, 30.0]),
            "adv_clip": st.sampled_from([0.5, 1.2, 5.0]),
        }
    ),
)
def test_every_forest_gets_the_credit_of_the_formulas(recipe, iteration, weights, prompts, seed, first_prompt, options):
    options["std"], options["std_shrinkage"] = options.pop("std, std_shrinkage")
    plan, credit = make_plan(recipe, iteration), recipe.credit.model_copy(update=options)
    assume(plan.leaves <= 40 and plan.trained_steps)
    scores, path_logp = drawn_case(plan, weights, prompts, seed)
    check(plan, credit, scores, weights, path_logp, first_prompt)


@pytest.mark.parametrize(
    "prune",
    [
        None,
        {"kind": "parent_top1"},
        {"kind": "extreme", "keep": 3},
        {"kind": "depth", "depths": 3, "first": 2, "stop": 9},
    ],
    ids=["none", "parent_top1", "extreme", "depth"],
)
@pytest.mark.parametrize(
    ("beta", "baseline"),
    [
        (0.0, "depth"),
        (1.5, "siblings"),
        *(pytest.param(*each, marks=pytest.mark.long) for each in [(1.5, "depth"), (0.0, "siblings")]),
    ],
)
@pytest.mark.parametrize(("std", "shrinkage"), STDS)
def test_the_published_tree(prune, beta, baseline, std, shrinkage):
    plan = make_plan(recipe_with(branch_tree(), prune=prune), 0)
    scores, path_logp = drawn_case(plan, [1.0, 0.5], 3, seed=5)
    credit = Credit(prune=prune, fusion_beta=beta, baseline=baseline, std=std, std_shrinkage=shrinkage)
    found = check(plan, credit, scores, [1.0, 0.5], path_logp)
    signs = np.sign(found[9 if prune is None or prune["kind"] != "depth" else 12].advantage)
    assert (signs > 0).any(axis=1).all()
    assert (signs < 0).any(axis=1).all()
    trained = sum(int(edges.trains.sum()) for edges in found.values())
    everything = sum(edges.trains.size for edges in found.values())
    assert trained < everything if prune is not None and prune["kind"] != "depth" else trained == everything


# Flat groups


def flat_plan(**rollout):
    return make_plan(recipe_with({**mix_window(), **rollout}, prune=None), 0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_flat_group_is_normalised_by_its_unbiased_deviation(shared):
    plan, rewards = flat_plan(shared_initial_noise=shared), np.random.default_rng(0).normal(size=(4, 12))
    found = assign_credit(plan, Credit(), rewards[..., None], [1.0])
    expected = torch.from_numpy(rewards)
    expected = (expected - expected.mean(dim=1, keepdim=True)) / (
        expected.std(dim=1, keepdim=True, correction=1) + 1e-8
    )
    assert list(found) == [0, 1, 2, 3]
    for edges in found.values():
        np.testing.assert_allclose(edges.advantage, expected.numpy(), rtol=1e-12)
        assert edges.trains.all()


def test_the_offset_below_the_deviation_is_1e_8():
    values = np.array([[0.0, 2e-6]])
    expected = 1e-6 / (math.sqrt(2) * 1e-6 + 1e-8)
    np.testing.assert_allclose(advantages(values, values, Credit(), 2), [[-expected, expected]], rtol=1e-9)


def test_several_rewards_count_by_their_weights_as_given():
    plan, random = flat_plan(), np.random.default_rng(1)
    scores, weights = random.normal(size=(2, 12, 2)) * [1.0, 100.0], [0.5, 2.0]

    def standard(values):
        return (values - values.mean(axis=1, keepdims=True)) / values.std(axis=1, ddof=1, keepdims=True)

    apart = assign_credit(plan, Credit(adv_clip=100), scores, weights)[0].advantage
    np.testing.assert_allclose(apart, 0.5 * standard(scores[..., 0]) + 2.0 * standard(scores[..., 1]), rtol=1e-6)
    together = assign_credit(plan, Credit(normalise="weighted_sum", adv_clip=100), scores, weights)[0].advantage
    np.testing.assert_allclose(together, standard(0.5 * scores[..., 0] + 200.0 * scores[..., 1] / 100), rtol=1e-6)
    assert np.abs(apart - together).max() > 0.1


def test_advantages_are_clamped_after_their_sum():
    plan = flat_plan()
    scores = np.zeros((1, 12, 2))
    scores[0, 3] = [1.0, -1.0]  # the two rewards cancel: a clamp of each alone would not
    scores[0, 7] = [1.0, 1.0]
    advantage = assign_credit(plan, Credit(adv_clip=1.5), scores, [2.0, 1.0])[0].advantage
    free = assign_credit(plan, Credit(adv_clip=100), scores, [2.0, 1.0])[0].advantage
    assert np.abs(free).max() > 1.5
    np.testing.assert_array_equal(advantage, np.clip(free, -1.5, 1.5))


# Where there is no signal


@pytest.mark.parametrize("baseline", ["depth", "siblings"])
@pytest.mark.parametrize("std", ["group", "global", "leaves", "none"])
@pytest.mark.parametrize(
    ("spread", "is_zero"), [(0.0, True), (1e-12, True), (0.9e-6, True), (1.1e-6, False), (1e-3, False)]
)
def test_a_group_within_1e_6_has_no_advantage_at_all(baseline, std, spread, is_zero):
    rewards = np.random.default_rng(2).normal(size=(2, 12, 1))
    rewards[0, :, 0] = 0.25 + np.linspace(0, spread, 12)
    advantage = assign_credit(flat_plan(), Credit(baseline=baseline, std=std), rewards, [1.0])[0].advantage
    assert (advantage[0] == 0).all() == is_zero
    assert (advantage[1] != 0).all()


def test_a_reward_without_spread_leaves_the_others_alone():
    scores = np.random.default_rng(3).normal(size=(1, 12, 2))
    scores[..., 1] = 0.7
    alone = assign_credit(flat_plan(), Credit(), scores[..., :1], [1.0])[0].advantage
    np.testing.assert_array_equal(assign_credit(flat_plan(), Credit(), scores, [1.0, 9.0])[0].advantage, alone)


def test_a_depth_of_one_node_has_no_advantage():
    """Before the first split there is one node: stochastic, trained, and nothing to compare it with."""
    rollout = {"steps": 6, "group_size": 4, "tree": {"splits": [2, 3], "fanout": 2}, "window": {"strategy": "all"}}
    plan = make_plan(recipe_with(rollout), 0)
    found = assign_credit(plan, Credit(), np.random.default_rng(4).normal(size=(3, 4, 1)), [1.0])
    assert [step.nodes_out for step in plan.trained_steps] == [1, 1, 2, 4, 4]
    assert [bool((found[index].advantage != 0).all()) for index in range(5)] == [False, False, True, True, True]
    assert all((found[index].advantage == 0).all() for index in (0, 1))
    # edges without advantage are still selected: they count in N_u
    assert all(found[index].trains.all() for index in range(5))


@pytest.mark.parametrize("std", ["group", "global"])
def test_equal_leaves_below_unequal_ones(std):
    """Two halves of a tree with means that are alike: no advantage at that depth, but one further down."""
    plan = make_plan(recipe_with({"steps": 4, "group_size": 4, "tree": {"splits": [0, 1], "fanout": 2}}), 0)
    found = assign_credit(plan, Credit(std=std), np.array([[[0.0], [1.0], [1.0], [0.0]]]), [1.0])
    assert (found[0].advantage == 0).all()
    np.testing.assert_allclose(found[1].advantage, np.array([[-0.5, 0.5, 0.5, -0.5]]) / math.sqrt(1 / 3), rtol=1e-7)


# What a tree's nodes are compared with, and divided by


def small_tree(roots=1, **rollout):
    """`roots` trees of 4 leaves: stochastic steps 0 to 4 with splits at 1 and 3."""
    rollout = {"steps": 6, "group_size": 4 * roots, "tree": {"splits": [1, 3], "fanout": 2}, **rollout}
    return make_plan(recipe_with({**rollout, "shared_initial_noise": roots == 1}, prune=None), 0)


def test_siblings_are_compared_with_each_other_alone():
    scores = np.array([[[1.0], [2.0], [10.0], [16.0]]])
    found = assign_credit(small_tree(), Credit(baseline="siblings", std="none", adv_clip=100), scores, [1.0])
    halves, leaves = [-11.5, 11.5], [-1.0, 1.0, -6.0, 6.0]
    assert [found[step].advantage[0].tolist() for step in range(5)] == [[0.0], halves, halves, leaves, leaves]


def test_before_the_first_split_the_roots_are_compared():
    scores = np.array([1.0, 2.0, 10.0, 16.0, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0, 3.0, 3.0])[None, :, None]
    found = assign_credit(small_tree(3), Credit(baseline="siblings", std="none", adv_clip=100), scores, [1.0])
    np.testing.assert_allclose(found[0].advantage[0], [7.25 - 1.5, 0.0 - 5.125, 3.0 - 3.625], rtol=1e-12)
    assert found[1].advantage[0].tolist() == [-11.5, 11.5, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("std", ["group", "global", "leaves", "none"])
def test_in_a_flat_group_siblings_differ_from_the_mean_by_a_constant_factor(std):
    plan, rewards = flat_plan(), np.random.default_rng(11).normal(size=(4, 12, 1))
    among, from_mean = (
        assign_credit(plan, Credit(baseline=baseline, std=std), rewards, [1.0])[0].advantage
        for baseline in ("siblings", "depth")
    )
    np.testing.assert_allclose(among, from_mean * 12 / 11, rtol=1e-12)


def test_in_a_flat_group_the_leaves_are_the_group_to_the_last_bit():
    plan, rewards = flat_plan(), np.random.default_rng(12).normal(size=(4, 12, 1))
    leaves, group = (assign_credit(plan, Credit(std=std), rewards, [1.0]) for std in ("leaves", "group"))
    assert all(np.array_equal(leaves[step].advantage, group[step].advantage) for step in group)


def test_two_halves_count_by_how_much_they_explain():
    """The group's own spread makes ±0.71 of any two; the leaves' tells a split that matters from one that does not."""
    scores = np.array([[0.0, 2.0, 1.1, 3.1], [0.0, 0.2, 3.0, 3.2]])[..., None]
    by_group, by_leaves = (
        assign_credit(small_tree(), Credit(std=std), scores, [1.0])[1] for std in ("group", "leaves")
    )
    np.testing.assert_allclose(np.abs(by_group.advantage), math.sqrt(0.5), rtol=1e-6)
    matters_not, matters = np.abs(by_leaves.advantage[:, 0])
    assert matters_not < 0.5
    assert matters > 0.8


def test_shrinkage_goes_from_the_spread_of_a_depth_to_that_of_the_leaves():
    plan, scores = small_tree(), np.random.default_rng(13).normal(size=(3, 4, 1))

    def at(**credit):
        return assign_credit(plan, Credit(**credit), scores, [1.0])[1].advantage

    np.testing.assert_array_equal(at(std_shrinkage=0.0), at(std="group"))
    np.testing.assert_allclose(at(std_shrinkage=1e12), at(std="leaves"), rtol=1e-9)
    ends = np.sort([at(std="group"), at(std="leaves")], axis=0)
    assert ((ends[0] < at(std_shrinkage=3.0)) & (at(std_shrinkage=3.0) < ends[1])).all()


def test_shrinkage_of_what_is_no_groups_spread_is_refused():
    text = user_error(parse_recipe, recipe_content(credit={"std": "leaves", "std_shrinkage": 2}))
    assert "std_shrinkage" in text
    assert "group" in text


# Fusion


def test_fusion_weighs_leaves_by_their_path():
    reward, path_logp = np.array([[1.0, 3.0, 5.0, 9.0]]), np.log([[0.2, 0.6, 0.5, 0.5]])
    np.testing.assert_allclose(fused(reward, 2, path_logp, 1.0), [[0.25 * 1 + 0.75 * 3, 7.0]], rtol=1e-12)
    np.testing.assert_allclose(fused(reward, 2, path_logp, -1.0), [[0.75 * 1 + 0.25 * 3, 7.0]], rtol=1e-12)
    np.testing.assert_allclose(fused(reward, 2, path_logp, 0.0), [[2.0, 7.0]], rtol=1e-12)
    np.testing.assert_allclose(fused(reward, 4, path_logp, 3.0), reward, rtol=1e-12)


def test_fusion_of_long_paths_neither_overflows_nor_vanishes():
    reward, path_logp = np.array([[1.0, 3.0], [2.0, 6.0]]), np.array([[1.0, 0.0], [-900.0, -900.0]])
    np.testing.assert_allclose(fused(reward, 1, path_logp, 2000.0), [[1.0], [4.0]])
    np.testing.assert_allclose(fused(reward, 1, path_logp, -2000.0), [[3.0], [4.0]])


def test_pruned_depths_belong_to_the_path_all_the_same():
    """Pruning removes edges from training only: what a leaf's path is, and so its weight in fusion, stays."""
    rollout = {"steps": 5, "group_size": 4, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "all"}}
    nodes = [1, 2, 2, 4, 4, 4]  # of a prompt, by level
    logp = [
        10.0**level * torch.arange(1.0, 2 * count + 1, dtype=torch.float64).view(2, count)
        for level, count in enumerate(nodes)
    ]
    logp[0], logp[5] = torch.zeros(2, 1), torch.zeros(2, 4)  # no edge leads to a root, and the last step is no density
    paths = torch.stack([level.repeat_interleave(4 // level.shape[1], dim=1) for level in logp]).sum(dim=0)
    for prune in (None, {"kind": "depth", "depths": 1, "first": 2, "stop": 4}):
        plan = make_plan(recipe_with(rollout, prune=prune), 0)
        assert [step.nodes_in for step in plan.steps] == nodes[:-1]
        assert len(plan.trained_steps) == (4 if prune is None else 3)
        forest = Forest.allocate(plan, 2, (1,), torch.float64, torch.device("cpu"))
        for level, count in enumerate(nodes):
            edges = None if level == 0 else logp[level].double().flatten()
            forest.keep(level, torch.zeros(2 * count, 1, dtype=torch.float64), edges)
        torch.testing.assert_close(leaf_path_logp(forest), paths.double())


# Prompts are never ranked together


@pytest.mark.parametrize("prune", [None, {"kind": "parent_top1"}, {"kind": "extreme", "keep": 2}])
@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize(
    "own",
    [{}, {"baseline": "siblings"}, {"std": "leaves"}, {"std_shrinkage": 3.0}, {"std": "none", "adv_clip": 1e6}],
    ids=lambda own: "-".join(own) or "published",
)
def test_a_prompt_is_credited_as_if_it_were_alone(prune, beta, own):
    plan = make_plan(recipe_with(branch_tree(), prune=prune), 0)
    credit = Credit(prune=prune, fusion_beta=beta, **own)
    scores, path_logp = drawn_case(plan, [1.0], 4, seed=6)
    scores += np.array([0.0, 100.0, -50.0, 1e4])[:, None, None]  # an easy prompt's worst is above a hard one's best
    together = assign_credit(plan, credit, scores, [1.0], path_logp)
    for prompt in range(4):
        alone = assign_credit(
            plan, credit, scores[prompt : prompt + 1], [1.0], path_logp[prompt : prompt + 1], first_prompt=prompt
        )
        for index, edges in together.items():
            np.testing.assert_array_equal(edges.advantage[prompt], alone[index].advantage[0])
            np.testing.assert_array_equal(edges.trains[prompt], alone[index].trains[0])
    per_prompt = {
        int(edges.trains[prompt].sum())
        for edges in together.values()
        if edges.trains.shape[1] == 16
        for prompt in range(4)
    }
    assert per_prompt == {{None: 16, "parent_top1": 8, "extreme": 4}[prune and prune["kind"]]}


def test_extreme_keeps_both_ends_of_each_prompt():
    plan = flat_plan()
    rewards = np.random.default_rng(8).permuted(np.tile(np.arange(12.0), (3, 1)), axis=1)
    found = assign_credit(plan, Credit(prune={"kind": "extreme", "keep": 2}), rewards[..., None], [1.0])[0]
    np.testing.assert_array_equal(found.trains, (rewards < 2) | (rewards > 9))
    np.testing.assert_array_equal(
        found.advantage, assign_credit(plan, Credit(), rewards[..., None], [1.0])[0].advantage
    )


def test_extreme_of_more_than_there_are_keeps_all():
    credit = Credit(prune={"kind": "extreme", "keep": 7})
    assert assign_credit(flat_plan(), credit, np.random.default_rng(9).normal(size=(1, 12, 1)), [1.0])[0].trains.all()


def test_parent_top1_keeps_the_chain_of_the_better_child():
    rollout = {"steps": 5, "group_size": 4, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "all"}}
    recipe = recipe_with(rollout, prune={"kind": "parent_top1"})
    found = assign_credit(make_plan(recipe, 0), recipe.credit, np.array([[[0.0], [1.0], [9.0], [8.0]]]), [1.0])
    halves, better = [True, True], [False, True, True, False]
    assert [found[index].trains[0].tolist() for index in range(4)] == [halves, halves, better, better]


# Precision


def test_differences_far_below_half_precision_survive():
    """fp16 knows 20 and 20.02, nothing between."""
    rewards = 20.0 + 1e-4 * np.random.default_rng(10).permutation(12).astype(np.float64)[None, :, None]
    advantage = assign_credit(flat_plan(), Credit(), rewards, [1.0])[0].advantage
    assert advantage.dtype == np.float64
    ranks = np.round((rewards[0, :, 0] - 20.0) * 1e4)
    np.testing.assert_allclose(advantage[0], (ranks - 5.5) / (math.sqrt(13) + 1e-4), rtol=1e-6)


# Scores: a reward that fails is never a 0


class Fake:
    def __init__(self, answer):
        self.answer = answer

    def __call__(self, pictures, prompts):
        return self.answer(len(prompts))


def rewards_with(**answers):
    """The recipe's two rewards, with what they answer replaced."""
    rewards = Rewards(parse_recipe(recipe_content(reward=[{"name": "shapes", "weight": 2.0}, {"name": "jpeg_size"}])))
    assert list(rewards.scorers) == ["shapes", "jpeg_size"]
    rewards.scorers.update({name: Fake(answer) for name, answer in answers.items()})
    return rewards


PICTURES, SENTENCES = torch.full((3, 3, 32, 32), 0.5), ["a red circle at the centre"] * 3


def test_scores_are_float64_columns_in_the_order_of_the_recipe():
    third = torch.tensor(1 / 3, dtype=torch.float64)
    scores = rewards_with(shapes=lambda n: third + torch.arange(n), jpeg_size=lambda n: torch.full((n,), 0.25))(
        PICTURES, SENTENCES
    )
    assert scores.dtype == torch.float64
    assert scores.tolist() == [[third.item(), 0.25], [third.item() + 1, 0.25], [third.item() + 2, 0.25]]
    assert rewards_with().weights == [2.0, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_is_an_error_that_names_its_reward(value):
    rewards = rewards_with(jpeg_size=lambda n: torch.tensor([0.5, value, 0.5]))
    assert "jpeg_size" in user_error(rewards, PICTURES, SENTENCES)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), ()])
def test_scores_of_another_number_are_an_error_that_names_their_reward(shape):
    rewards = rewards_with(shapes=lambda n: torch.zeros(shape))
    assert "shapes" in user_error(rewards, PICTURES, SENTENCES)


def test_a_reward_that_raises_is_not_swallowed():
    def fail(n):
        raise RuntimeError("the server is down")

    with pytest.raises(RuntimeError, match="server is down"):
        rewards_with(jpeg_size=fail)(PICTURES, SENTENCES)


def test_a_prompt_that_the_shapes_reward_cannot_judge_is_an_error_not_a_0():
    text = user_error(rewards_with(), PICTURES, [SENTENCES[0], "a photo of a dog", SENTENCES[0]])
    assert "a photo of a dog" in text


@pytest.mark.parametrize("name", ["shapes", "jpeg_size"])
def test_pictures_that_are_not_numbers_are_an_error_not_a_0(name):
    """A model that has diverged draws NaN."""
    rewards = Rewards(parse_recipe(recipe_content(reward=[{"name": name}])))
    pictures = PICTURES.clone()
    assert torch.isfinite(rewards(pictures, SENTENCES)).all()
    pictures[1] = float("nan")
    user_error(rewards, pictures, SENTENCES)


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        ([{"name": "shaps"}], ["shaps", "shapes"]),
        ([{"name": "shapes", "scale": 2}], ["shapes", "scale"]),
        ([{"name": "shapes"}, {"name": "shapes", "weight": 2}], ["shapes"]),
    ],
)
def test_a_reward_that_cannot_be_built_is_an_error(reward, names):
    text = user_error(Rewards, parse_recipe(recipe_content(reward=reward)))
    assert all(name in text for name in names)
