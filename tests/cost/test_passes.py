"""Passes that are counted before a run against those that an iteration runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from flowgrove.cost.passes import ROLLOUT, Engine, passes_of_evaluation, passes_of_iteration
from flowgrove.cost.speeds import flops_of
from flowgrove.evaluation import sample
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.budget import PassBudget
from flowgrove.plan.flops import count_flops
from flowgrove.rewards import scoring
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.tuning.graph_room import NO_ROOM, GraphRoom
from flowgrove.update.updater import Updater
from policy_cases import CPU, TEXTS, small_recipe

TREE = {"steps": 6, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "frozen", "size": 3}}
FP32 = {"adapter": "sd3", "path": "tiny", "dtype": "fp32"}
KEPT = GraphRoom(12, 0.5)
CASES = {
    "nothing kept": ({}, NO_ROOM, 140),
    "some kept": ({}, KEPT, 140),
    "all kept, in large passes": ({}, GraphRoom(10**6, 0.0), 4096),
    "a tree": ({"rollout": TREE}, KEPT, 175),
    "a tree, unshared": ({"rollout": TREE, "engine": {"share": False}}, NO_ROOM, 175),
    "a tree, replayed": ({"rollout": TREE, "engine": {"exact_replay": True}}, NO_ROOM, 175),
    "guidance in some steps": (
        {"model": {**FP32, "guidance_scale": 3.0}, "rollout": {"guidance_range": [1, 3]}}, KEPT, 210
    ),
    "half of guidance detached": (
        {"model": {**FP32, "guidance_scale": 3.0}, "update": {"detach_unconditional": True}}, KEPT, 210
    ),
    "a reference model": ({"update": {"kl_weight": 0.1}}, KEPT, 140),
    "a reference model of a tree": (
        {"rollout": TREE, "update": {"kl_weight": 0.1, "updates_per_iteration": 4}}, NO_ROOM, 175
    ),
    "a reference model, replayed": (
        {"rollout": TREE, "update": {"kl_weight": 0.1}, "engine": {"exact_replay": True}}, NO_ROOM, 175
    ),
    "a reference model, unshared": ({"update": {"kl_weight": 0.1}, "engine": {"share": False}}, NO_ROOM, 140),
    "a reference model in bf16": (
        {"model": {**FP32, "dtype": "bf16"}, "update": {"kl_weight": 0.1, "updates_per_iteration": 4}}, NO_ROOM, 140
    ),
    "old log-probabilities anew": ({"model": {**FP32, "dtype": "bf16"}}, KEPT, 140),
    "some steps train": ({"update": {"step_fraction": 0.5}}, NO_ROOM, 140),
    "pruned by rewards": ({"rollout": TREE, "credit": {"prune": {"kind": "depth", "every": 1}}}, NO_ROOM, 140),
    "some steps in 8 bits": (
        {"rollout": {**TREE, "precision": "int8", "window": {"strategy": "frozen", "size": 2}}}, KEPT, 175
    ),
    "two sizes": ({"model": {**FP32, "sizes": [[32, 32], [32, 16]]}}, KEPT, 140),
}  # fmt: skip


class RecordingRunner(PassRunner):
    """Notes what runs: (kind, states, rows of a state), and samples that are decoded together."""

    def __init__(self, tokens, row):
        super().__init__(PassBudget(tokens, row, 5000))
        self.passes, self.decodes = Counter(), Counter()

    def velocity(self, policy, x, sigma, prompts, prompt_of, on_host=None):
        kind = "reference" if not policy.tuned else "graph" if torch.is_grad_enabled() else "forward"
        kind = "cheap" if policy.precision is not None else kind
        self.passes[kind, len(x), 1 if prompts.uncond is None else 2] += 1
        return super().velocity(policy, x, sigma, prompts, prompt_of, on_host)

    def decode(self, policy, x):
        together = self.budget.samples(policy.adapter.geometry.pixels)
        self.decodes.update(len(part) for part in x.split(together))
        return super().decode(policy, x)


def loaded(recipe, tokens):
    policy = Policy.load(recipe, CPU)
    largest = max(policy.sized(sized).adapter.geometry.tokens for sized in recipe.at_sizes())
    return policy, RecordingRunner(tokens, largest)


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_runs_the_passes_that_were_counted(case, monkeypatch):
    sections, room, tokens = CASES[case]
    if "precision" in sections.get("rollout", {}):
        pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    recipe = small_recipe(**{"model": FP32, **sections})
    policy, runner = loaded(recipe, tokens)
    setup, rewards = Setup(recipe), Rewards(recipe, CPU)
    draw = torch.Generator().manual_seed(0)  # no edge without an advantage
    monkeypatch.setattr(rewards, "scorers", {"shapes": lambda pictures, texts: torch.rand(len(texts), generator=draw)})
    Stages(setup, policy, Updater(recipe, policy, runner), rewards, room).run(TEXTS, 0)
    sizes = [policy.sized(sized).adapter.geometry for sized in recipe.at_sizes()]
    prompts = [len(TEXTS[number :: len(sizes)]) for number in range(len(sizes))]
    doubled = 2 if policy.doubles else 1
    full = runner.budget.rows // doubled
    trained = 1 if recipe.halves_apart else doubled
    engine = Engine(tokens, doubled, 5000, beside=False, graphs=lambda: room.graphs(full), trained=trained)
    found = passes_of_iteration(recipe, setup.first_plan, prompts, sizes, engine)
    kinds = {"kept": "graph", "train": "graph", "half": "graph", "reference": "reference", "cheap": "cheap"}
    counted, decodes, backwards = Counter(), Counter(), 0
    assert {one.rows for each in found for one in each.of_transformer if one.kind == "backward"} <= {trained}
    for part in found:
        for (kind, states, rows), count in part.of_transformer.items():
            if kind == "backward":
                backwards += states * count
            else:
                counted[kinds.get(kind, "forward"), states, rows] += count
        decodes.update(part.decodes)
    assert counted == runner.passes
    assert decodes == runner.decodes
    assert (backwards > 0) == (room is not NO_ROOM)
    assert sum(part.samples for part in found) == len(TEXTS) * setup.first_plan.leaves


def test_a_detached_half_takes_from_the_update_and_not_from_the_rollout():
    """2 of a forward and 1 of a backward, where a whole training pass has 2 of each."""
    found = []
    for detached in (False, True):
        recipe = small_recipe(model={**FP32, "guidance_scale": 3.0}, update={"detach_unconditional": detached})
        setup = Setup(recipe)
        (flops,) = count_flops(recipe)
        engine = Engine(4096, 2, 5000, beside=False, trained=flops.trained)
        (passes,) = passes_of_iteration(recipe, setup.first_plan, [3], [flops.geometry], engine)
        stages = Counter()
        for one, count in passes.of_transformer.items():
            stages[one.kind in ROLLOUT] += count * flops_of(one, flops)
        found.append(stages)
    whole, half = found
    assert half[True] == whole[True]
    states = whole[False] // (2 * (flops.train + flops.recomputed))
    assert whole[False] - half[False] == states * (flops.backward + flops.recomputed)


@pytest.mark.parametrize("guidance", [None, 4.0])
def test_an_evaluation_runs_the_passes_that_were_counted(guidance):
    recipe = small_recipe(model=FP32, run={"eval": {"samples": 3, "steps": 4, "guidance_scale": guidance}})
    policy, runner = loaded(recipe, 280)
    setup, texts = Setup(recipe), [f"a red circle number {number}" for number in range(35)]
    sample(setup, policy, runner, texts)
    engine = Engine(280, 1 if guidance is None else 2, 5000, beside=False)
    found = passes_of_evaluation(setup.eval_plan, len(texts), policy.adapter.geometry, engine)
    assert found.of_transformer == runner.passes
    assert found.decodes == runner.decodes
    assert found.samples == 3 * 35


def test_groups_that_are_scored_whole_are_decoded_whole(monkeypatch):
    recipe = small_recipe(model=FP32, rollout={"group_size": 6})
    plan, geometry = Setup(recipe).first_plan, Policy.load(recipe, CPU).adapter.geometry
    monkeypatch.setattr(scoring, "PIXELS_AT_ONCE", 8 * geometry.pixels)
    engine = Engine(10_000, 1, 100 * geometry.pixels, beside=False)
    for whole, decodes in ((False, {8: 2, 2: 1}), (True, {6: 3})):
        (found,) = passes_of_iteration(recipe, plan, [3], [geometry], replace(engine, whole_groups=whole))
        assert found.decodes == decodes


def test_scoring_beside_the_rollout_takes_some_prompts_at_a_time():
    """As many as fill half a pass where the forest is narrowest."""
    recipe = small_recipe(model=FP32, data={"prompts": "unused.txt", "prompts_per_iteration": 7})
    plan, geometry = Setup(recipe).first_plan, Policy.load(recipe, CPU).adapter.geometry
    tokens = 2 * 35 * plan.roots * 2  # two prompts fill half of it
    (alone,) = passes_of_iteration(recipe, plan, [7], [geometry], Engine(tokens, 1, 5000, beside=False))
    (beside,) = passes_of_iteration(recipe, plan, [7], [geometry], Engine(tokens, 1, 5000, beside=True))

    def states(found):
        return sum(one.states * count for one, count in found.of_transformer.items() if one.kind == "forward")

    assert states(alone) == states(beside) == 7 * plan.counts.rollout_forwards
    assert max(one.states for one in beside.of_transformer if one.kind == "forward") <= 2 * plan.leaves
    assert beside.of_transformer.total() > alone.of_transformer.total()
