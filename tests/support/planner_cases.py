"""Recipes for the planner's tests, and a forest of explicit nodes to count by hand what a plan only computes."""

import math
from dataclasses import dataclass

import pytest
import yaml
from hypothesis import strategies as st

from flowgrove.errors import UserError
from flowgrove.recipe.loading import parse_recipe


def recipe_content(**sections):
    """The least that a recipe must say, plus `sections`."""
    return {
        "model": {"adapter": "sd3", "path": "tiny"},
        "data": {"prompts": "prompts.txt"},
        "reward": [{"name": "shapes"}],
        **sections,
    }


def recipe_with(rollout, *, updates=1, prune=None, seed=42, **update):
    update["updates_per_iteration"] = updates
    return parse_recipe(recipe_content(rollout=rollout, update=update, credit={"prune": prune}, run={"seed": seed}))


def value_at(content, key):
    for part in key.split(".") if key else ():
        content = content[part]
    return content


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def branch_tree(**rollout):
    """BranchGRPO's published tree: T = 20, splits 0, 3, 6, 9 into 2, so 16 leaves."""
    return {"steps": 20, "group_size": 16, "tree": {"splits": [0, 3, 6, 9], "fanout": 2}, **rollout}


def mix_window(**window):
    """MixGRPO's published flat group: T = 25, G = 12, a window of 4 that moves by one every 25 iterations."""
    return {
        "steps": 25,
        "group_size": 12,
        "window": {"strategy": "progressive", "size": 4, "every": 25, "stride": 1, **window},
    }


def user_error(action, *arguments):
    """The text of the UserError that `action` must raise: always one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    text = str(caught.value)
    assert text.strip()
    assert "\n" not in text
    return text


@dataclass(eq=False)
class Node:
    """A distinct state of the rollout; the edge that leads to it carries its name."""

    parent: "Node | None"
    sibling: int


def grow(roots, fanouts):
    """Levels 0 … T of explicit nodes, children of one parent side by side."""
    levels = [[Node(None, 0) for _ in range(roots)]]
    for fanout in fanouts:
        levels.append([Node(parent, sibling) for parent in levels[-1] for sibling in range(fanout)])
    return levels


def trajectory(leaf):
    """The nodes from below the root to the leaf: item i is the child of step i."""
    nodes = []
    while leaf.parent is not None:
        nodes.append(leaf)
        leaf = leaf.parent
    return nodes[::-1]


def train_by_hand(levels, trained_steps, update_of_leaf, *, keep_siblings=False, selected=None, kept_leaves=None):
    """(trained edges as (step, child index), train passes): walks along every trajectory as the naive loop does, and
    trains each edge once.

    update_of_leaf: the update of leaf number i. selected: per leaf, the steps its sample trains. kept_leaves: what
    pruning leaves, by number.
    """
    leaves = levels[-1]
    first_leaf, on_kept_chain = {}, set()
    for number, leaf in enumerate(leaves):
        for child in trajectory(leaf):
            first_leaf.setdefault(child, number)
            if kept_leaves is None or number in kept_leaves:
                on_kept_chain.add(child)
    edges, passes = set(), set()
    for step in trained_steps:
        eldest = {}
        for index, child in enumerate(levels[step + 1]):
            eldest.setdefault(child.parent, child)
            if child in on_kept_chain and (selected is None or step in selected[first_leaf[child]]):
                edges.add((step, index))
                leader = eldest[child.parent] if keep_siblings else child
                passes.add((step, child.parent, update_of_leaf(first_leaf[leader])))
    return edges, len(passes)


def better_children(levels, split, choose):
    """Numbers of the leaves that are left when every parent at step `split` keeps only its child
    number choose(parent's number).
    """
    numbers = {parent: number for number, parent in enumerate(levels[split])}
    chains = ((number, trajectory(leaf)[split]) for number, leaf in enumerate(levels[-1]))
    return {number for number, child in chains if child.sibling == choose(numbers[child.parent])}


@st.composite
def rollouts(draw):
    """Any rollout section that fits itself: flat or tree, shared noise or not, every window strategy,
    with and without a tail.
    """
    steps = draw(st.integers(2, 14))
    shared = draw(st.booleans())
    splits = st.sets(st.integers(0, steps - 2), min_size=1, max_size=3).map(sorted)
    tree = draw(st.none() | st.fixed_dictionaries({"splits": splits, "fanout": st.integers(2, 3)}))
    low = draw(st.integers(0, steps - 2))
    high = draw(st.integers(low + 1, steps - 1))
    size = draw(st.integers(1, high - low))
    strategies = ["all", "progressive", "random", "decay", "exp_decay", "frozen"] + ["none"] * (
        tree is not None or not shared
    )
    window = {
        "strategy": draw(st.sampled_from(strategies)),
        "range": [low, high],
        "size": size,
        "every": draw(st.integers(1, 6)),
        "stride": draw(st.integers(1, 3)),
        "start": draw(st.integers(0, high - low - size)),
        "wrap": draw(st.booleans()),
    }
    below = tree["fanout"] ** len(tree["splits"]) if tree else 1
    return {
        "steps": steps,
        "shift": draw(st.sampled_from([0.5, 1.0, 3.0, 7.3])),
        "shared_initial_noise": shared,
        "window": window,
        "tree": tree,
        "group_size": (below if shared else below * draw(st.integers(1, 3))) if tree else draw(st.integers(1, 7)),
        "tail": draw(st.none() | st.fixed_dictionaries({"compress": st.sampled_from([0.1, 0.25, 0.4, 0.5, 1.0])})),
    }


PRUNES = st.sampled_from([None, {"kind": "parent_top1"}]) | st.fixed_dictionaries(
    {
        "kind": st.just("depth"),
        "depths": st.integers(1, 4),
        "first": st.integers(0, 6),
        "stop": st.integers(4, 13),
        "every": st.integers(1, 5),
    }
)


@st.composite
def recipes(draw, prunes=PRUNES):
    """Any recipe whose plan can be made."""
    rollout = draw(rollouts())
    update = {
        "updates_per_iteration": draw(st.integers(1, min(4, rollout["group_size"]))),
        "partition": draw(st.sampled_from(["trajectories", "parents"])),
        "step_fraction": draw(st.sampled_from([1.0, 0.6, 0.25])),
    }
    return parse_recipe(
        recipe_content(
            rollout=rollout,
            update=update,
            credit={"prune": draw(prunes)},
            run={"seed": draw(st.integers(0, 2**32 - 1))},
        )
    )


def fanouts_by_the_book(rollout, window, levels):
    """DESIGN §3.2: a tree fans out at its splits;
    without one, the first stochastic step fans a shared root out to the group.
    """
    if rollout.tree is not None:
        at = dict.fromkeys(rollout.tree.splits, rollout.tree.fanout)
    elif rollout.shared_initial_noise:
        at = {min(window): rollout.group_size}
    else:
        at = {}
    roots = 1 if rollout.shared_initial_noise else rollout.group_size // math.prod(at.values())
    return roots, [at.get(step, 1) for step in range(levels)]


def four_counts(counts):
    return counts.rollout_forwards, counts.edges, counts.trained_edges, counts.train_passes


def widths(plan):
    return [step.nodes_in for step in plan.steps]


def stochastic_steps(plan):
    return [step.index for step in plan.steps if step.stochastic]


def trained_steps(plan):
    return [step.index for step in plan.steps if step.trained]


def forest_of(plan):
    return grow(plan.roots, [step.fanout for step in plan.steps])
