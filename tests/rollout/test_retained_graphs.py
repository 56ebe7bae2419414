"""engine.reuse_rollout_graph: the rollout's own graph gives the first update the losses and gradients of running its
passes again, and saves their forward.
"""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowgrove.credit import assign_credit
from flowgrove.plan.division import ALONE
from flowgrove.plan.memory import predict_memory
from flowgrove.plan.planner import make_plan
from flowgrove.rollout.loop import rollout
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.setup import Setup
from flowgrove.tuning import graph_room
from flowgrove.tuning.graph_room import GraphRoom
from flowgrove.update.passes import Rolled
from policy_cases import TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from update_cases import CASES, Recorder, policy_with_reference

MANY = 10**6


def trained(recipe, policy, retained, planted=None):
    """(forest, stats, gradients per update, forwards of the update's own) of one iteration; `planted`:
    scores [prompts, leaves, 1].
    """
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(
        plan, rows, policy, prompts, runner_of(policy), seed=recipe.run.seed, iteration=0, retained=retained
    )
    scores = np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)) if planted is None else planted
    credit = assign_credit(plan, recipe.credit, scores, [1.0])
    seen = []
    hook = policy.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    recorder = Recorder(recipe, policy)
    stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    hook.remove()
    return forest, stats, [torch.cat([g.flatten() for g in update]) for update in recorder.gradients], seen


def agree(first, second):
    for one, other in zip(first[2], second[2], strict=True):
        assert float(one.norm()) > 1e-6
        assert float((one - other).norm()) <= 1e-10 * float(one.norm())
    assert float(torch.stack(first[1].loss).sum()) == pytest.approx(float(torch.stack(second[1].loss).sum()), rel=1e-10)
    assert torch.allclose(first[0].leaves, second[0].leaves, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_retained_graphs_give_the_same_losses_and_gradients(case):
    recipe = small_recipe(**CASES[case])
    policy = policy_with_reference(recipe, 1.0) if recipe.update.kl_weight else policy_of()
    plain, kept = trained(recipe, policy, None), trained(recipe, policy, RetainedGraphs(MANY))
    agree(plain, kept)
    assert sum(kept[3]) < sum(plain[3]), "the first update's forwards were saved"
    if recipe.update.updates_per_iteration == 1:
        assert not kept[3]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_retained_graphs_serve_guidance(guidance):
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of(guidance=guidance)
    plain, kept = trained(recipe, policy, None), trained(recipe, policy, RetainedGraphs(MANY))
    agree(plain, kept)
    assert plain[3]
    assert not kept[3]


@pytest.mark.parametrize("room", [0, 3, 6, 7, 20])
def test_room_for_some_rows_keeps_some_passes(room):
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of(tokens=140)  # 4 rows a pass
    retained = RetainedGraphs(room)
    plain, kept = trained(recipe, policy, None), trained(recipe, policy, retained)
    agree(plain, kept)
    held = sum(len(each.node) for each in retained.passes)
    assert held <= room
    assert sum(plain[3]) - sum(kept[3]) == held


def test_small_passes_are_not_worth_keeping():
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of()
    retained = RetainedGraphs(MANY, least=4)
    trained(recipe, policy, retained)
    assert [len(each.node) for each in retained.passes] == [4 * len(TEXTS)], (
        "the window's first level has one state per prompt, the second four"
    )


def test_passes_without_signal_run_no_backward():
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of(tokens=35)  # a row a pass
    scores = np.random.default_rng(0).random((len(TEXTS), 4, 1))
    scores[1] = 0.5
    retained = RetainedGraphs(MANY)
    _, stats, _, _ = trained(recipe, policy, retained, scores)
    assert len(retained.passes) == len(TEXTS) * 5
    assert stats.train_passes == (len(TEXTS) - 1) * 5


def test_drift_is_exactly_zero_where_the_rollouts_own_velocity_serves():
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of(dtype="fp32")
    _, stats, _, seen = trained(recipe, policy, RetainedGraphs(MANY))
    assert not seen
    assert float(torch.cat(stats.drift).abs().max()) == 0.0
    assert len(torch.cat(stats.drift)) > 0


def room(engine=None, policy=None, **sections):
    recipe = small_recipe(engine={"device": "cpu", **(engine or {})}, **sections)
    policy = policy or policy_of()
    return GraphRoom.of(Setup(recipe), policy, runner_of(policy))


def test_the_recipe_decides_whether_graphs_are_kept():
    policy, guided = policy_of(), policy_of(guidance=2.5)
    runner = runner_of(policy)
    for off in ({"reuse_rollout_graph": False}, {"share": False}, {"exact_replay": True}):
        assert room(off).retained_graphs(policy, runner) is None
    always = room({"reuse_rollout_graph": True}).retained_graphs(policy, runner)
    assert (always.rows, always.least) == (sys.maxsize, 1)
    automatic = room()
    assert automatic.states > 1000
    assert automatic.retained_graphs(policy, runner).least == runner.budget.rows // 4
    assert automatic.retained_graphs(guided, runner).least == runner.budget.rows // 2 // 4
    assert room(policy=guided).states == pytest.approx(automatic.states / 2, rel=0.05), (
        "guidance runs two rows for a state"
    )
    assert room(credit={"prune": {"kind": "extreme", "keep": 1}}).retained_graphs(policy, runner) is None, (
        "most graphs would be made for nothing"
    )
    assert room(credit={"prune": {"kind": "depth", "first": 1, "depths": 1}}).states == automatic.states


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch):
    policy = policy_of()
    alone, graph = graph_room._room_of_cpu(policy, runner_of(policy))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert graph_room._room_of_cpu(policy, runner_of(policy)) == (alone // 4, graph)


@pytest.mark.parametrize("rows", [0, 5])
def test_a_gpu_keeps_what_fits_beside_all_else(rows, monkeypatch):
    recipe, policy = small_recipe(), policy_of()
    memory = predict_memory(recipe, make_plan(recipe, 0), "cpu")
    monkeypatch.setattr(
        graph_room,
        "total_memory",
        lambda device: int((memory.peak + (rows + 0.5) * memory.graph) / graph_room.GPU_SHARE),
    )
    found, graph = graph_room._room_of_gpu(Setup(recipe), policy, runner_of(policy), ALONE)
    assert graph == memory.graph
    assert found // graph == rows
    beside = replace(policy, bytes_when_loaded=memory.loaded + 3 * graph)  # three states' worth of reward models
    assert graph_room._room_of_gpu(Setup(recipe), beside, runner_of(policy), ALONE)[0] // graph == rows - 3


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_predicted_bytes_of_a_graph_are_what_the_model_holds(guidance):
    recipe, policy = small_recipe(model={"guidance_scale": guidance}), policy_of(guidance=guidance)
    assert predict_memory(recipe, make_plan(recipe, 0), "cpu").graph == pytest.approx(
        graph_room._room_of_cpu(policy, runner_of(policy))[1], rel=0.1
    )
