"""The counts of MATH §5, by hooks on the transformer:
rows forward in the rollout, rows whose backward runs in the updates.
"""

import numpy as np
import pytest

from flowgrove.credit import assign_credit
from flowgrove.rollout.loop import rollout
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.update.passes import Rolled
from policy_cases import plan_and_coefficients, policy_of, runner_of, small_recipe
from update_cases import Recorder

TREE = {
    "steps": 20,
    "group_size": 16,
    "dynamics": "dance_sde",
    "noise_level": 0.3,
    "tree": {"splits": [0, 3, 6, 9], "fanout": 2},
}
WINDOW = {"steps": 25, "group_size": 12, "window": {"strategy": "frozen", "size": 4, "start": 0}}
LAST = 20  # a window's last position in 25 steps


def window_at(start):
    return {**WINDOW, "window": {**WINDOW["window"], "start": start}}


PLANS = {  # rollout forwards, train passes
    "tree": ({**TREE, "window": {"strategy": "all"}}, 1, 203, 187),
    "tree_mix": ({**TREE, "window": {"strategy": "frozen", "size": 4, "start": 0}}, 1, 203, 19),
    "tree_mix_flash": (
        {**TREE, "window": {"strategy": "frozen", "size": 4, "start": 0}, "tail": {"compress": 0.4}},
        1,
        107,
        19,
    ),
    **{f"window_{start}": (window_at(start), 1, (start + 1) + 12 * (24 - start), 37) for start in (0, 7, LAST)},
    **{
        f"window_{start}_four_updates": (window_at(start), 4, (start + 1) + 12 * (24 - start), 40)
        for start in (0, LAST)
    },
}
PUBLISHED = {"window_0": (300, 48), "window_7": (300, 48)}


def counted(rollout_keys, updates, retained=None, **engine):
    """(rows forward in the rollout, rows forward in the updates, rows backward) of one prompt in which
    every edge has an advantage.
    """
    recipe = small_recipe(
        rollout=rollout_keys, update={"updates_per_iteration": updates}, engine={"device": "cpu", **engine}
    )
    policy = policy_of(dtype="fp32")
    forward, backward = [], []

    def watch(module, arguments, output):
        forward.append(len(output[0]))
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: backward.append(len(gradient)))

    plan, rows = plan_and_coefficients(recipe)
    prompts = policy.encode(["a red circle at the top left"])
    hook = policy.transformer.register_forward_hook(watch)
    forest = rollout(
        plan,
        rows,
        policy,
        prompts,
        runner_of(policy),
        seed=0,
        iteration=0,
        share=recipe.engine.share,
        retained=retained,
    )
    rolled = sum(forward)
    credit = assign_credit(plan, recipe.credit, np.arange(float(plan.leaves)).reshape(1, -1, 1), [1.0])
    for edges in credit.values():
        edges.advantage[edges.advantage == 0] = 1e-3
    # the policy is shared by tests: nothing may step
    Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    hook.remove()
    return rolled, sum(forward) - rolled, sum(backward)


@pytest.mark.parametrize("name", PLANS)
def test_rows_that_run_are_those_of_the_table(name):
    keys, updates, forwards, passes = PLANS[name]
    assert counted(keys, updates, reuse_rollout_graph=False) == (forwards, passes, passes)


@pytest.mark.parametrize("name", ["tree_mix", "window_7"])
def test_retained_graphs_leave_the_backward_and_save_the_forward(name):
    keys, updates, forwards, passes = PLANS[name]
    assert counted(keys, updates, RetainedGraphs(10**6)) == (forwards, 0, passes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_loop_runs_every_step_and_every_edge(name):
    keys, updates, _, _ = PLANS[name]
    forwards, passes = PUBLISHED[name]
    assert counted(keys, updates, share=False, token_budget=1) == (forwards, passes, passes)
