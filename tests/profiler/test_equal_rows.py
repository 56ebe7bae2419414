"""No row goes through the transformer twice in an iteration, but for what is listed here with its count."""

from types import SimpleNamespace

import pytest
import torch

from engine_cases import refuse, succeed, tiny_recipe
from flowgrove.passes.budget import PassBudget
from flowgrove.profiler.equal_rows import (
    DECODING,
    EVALUATION,
    NOISE,
    REFERENCE,
    RENEWED,
    ROLLOUT,
    Repeated,
    RowLog,
    log_rows,
)
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from flowgrove.spans import span
from policy_cases import encoded, policy_of, small_recipe

PROMPTS = 2
TREE = {
    "steps": 7,
    "group_size": 8,
    "dynamics": "dance_sde",
    "noise_level": 0.3,
    "tree": {"splits": [0, 2, 4], "fanout": 2},
}
ALL, FROZEN = {"window": {"strategy": "all"}}, {"window": {"strategy": "frozen", "size": 2, "start": 1}}
FLAT = {"steps": 5, "group_size": 4}
ALGORITHMS = {
    "dance": {**FLAT, "dynamics": "dance_sde", "noise_level": 0.3, **ALL},
    "flow": {**FLAT, "shared_initial_noise": False, **ALL},
    "flow_fast": {**FLAT, "dynamics": "cps", "window": {"strategy": "random", "size": 2, "range": [0, 3]}},
    "mix": {**FLAT, **FROZEN},
    "mix_flash": {**FLAT, **FROZEN, "tail": {"compress": 0.4}},
    "branch": {**TREE, **ALL},
    "branch_mix": {**TREE, **FROZEN},
    "branch_mix_flash": {**TREE, **FROZEN, "tail": {"compress": 0.4}},
}
SAMPLED = [  # of which make test runs a window and a tree
    name if name in ("mix", "branch_mix") else pytest.param(name, marks=pytest.mark.long) for name in ALGORITHMS
]
KL = {"kl_weight": 0.1, "updates_per_iteration": 2}
KEPT, NONE_KEPT = ({"engine": {"reuse_rollout_graph": keeps}} for keeps in (True, False))
EVERYTHING = {
    "model": {"guidance_scale": 3.0, "lora": {"rank": 2, "alpha": 4}},
    "update": {**KL, "step_fraction": 0.5},
    "run": {"gradient_noise_every": 1, "eval": {"tuned_share": 0.5, "samples": 2}},
    **NONE_KEPT,
}


def logged(folder, iterations=2, **sections):
    """The log of a tiny run, and what it found by (first stage, stage again)."""
    setup = Setup(load_recipe(tiny_recipe(folder, **sections), ()))
    log = log_rows(setup, iterations)
    found = log.repeated(setup.recipe)
    return SimpleNamespace(
        setup=setup,
        log=log,
        rows={(one.first, one.again): one.rows for one in found},
        unexplained=[one for one in found if one.reason is None],
    )


@pytest.mark.parametrize("algorithm", SAMPLED)
def test_no_row_is_computed_twice_where_graphs_are_kept(tmp_path, algorithm):
    found = logged(tmp_path, rollout=ALGORITHMS[algorithm], **KEPT)
    assert found.rows == {}
    plans = [found.setup.plan(number) for number in range(2)]
    assert found.log.computed[ROLLOUT] == PROMPTS * sum(plan.counts.rollout_forwards for plan in plans)
    assert found.log.computed[DECODING] == PROMPTS * (sum(plan.leaves for plan in plans) + 2)  # and two evaluations
    assert found.log.computed[EVALUATION] == 2 * PROMPTS * ALGORITHMS[algorithm]["steps"]


@pytest.mark.parametrize("algorithm", SAMPLED)
def test_every_row_that_is_computed_twice_has_a_reason(tmp_path, algorithm):
    """With guidance, LoRA, a KL term, several updates, steps left out, a measured gradient and a mixed evaluation."""
    found = logged(tmp_path, rollout=ALGORITHMS[algorithm], **EVERYTHING)
    assert found.unexplained == []
    assert found.rows[ROLLOUT, NOISE] == found.log.computed[NOISE], "it has gradients of its own"
    assert all(first == ROLLOUT for first, _ in found.rows), "no reference row, no row of an update comes twice"


@pytest.mark.parametrize(
    "sections",
    [{"credit": {"prune": {"kind": "extreme", "keep": 1}}}, {"model": {"sizes": [[32, 32], [32, 16]]}}],
    ids=["pruned by rewards", "two sizes"],
)
def test_what_a_first_update_runs_again_is_what_has_no_graph(tmp_path, sections):
    found = logged(tmp_path, rollout=ALGORITHMS["branch_mix"], **NONE_KEPT, **sections)
    assert found.unexplained == []
    assert found.rows[ROLLOUT, "update 0"] == found.log.computed["update 0"] > 0
    assert set(found.rows) <= {(ROLLOUT, "update 0"), (ROLLOUT, "update 1")}  # where the first had nothing to train


def test_the_reference_runs_once_for_every_state_that_trains(tmp_path):
    """In float32; of the first iteration's states, whose model is untouched, the rollout had the same velocity."""
    found = logged(tmp_path, rollout=ALGORITHMS["mix"], update=KL, **KEPT)
    of_reference = {stage: rows for stage, rows in found.log.computed.items() if stage.endswith(REFERENCE)}
    assert sum(of_reference.values()) == 2 * PROMPTS * (1 + 4), "the shared root and 4 nodes"
    assert sum(found.rows.values()) == PROMPTS * (1 + 4)
    assert all(first == ROLLOUT and again.endswith(REFERENCE) for first, again in found.rows)


def test_in_bf16_passes_are_repeated_since_they_depend_on_their_batch(tmp_path):
    found = logged(tmp_path, rollout=ALGORITHMS["mix"], update=KL, model={"dtype": "bf16"}, **KEPT)
    assert found.unexplained == []
    assert found.rows["update 0, reference", "update 1, reference"] == PROMPTS  # the root, in the second iteration
    assert found.rows[ROLLOUT, RENEWED] == found.log.computed[RENEWED]


def test_rows_are_told_apart_by_all_that_goes_in():
    policy = policy_of(guidance=2.5)
    log = RowLog(PassBudget(4096, 1, 1))
    prompts, x = encoded(policy), torch.randn(2, *policy.adapter.latent_shape, dtype=torch.float64)

    def run(x, sigma=0.5, prompt=0, name="iteration 0/rollout"):
        with span(name):
            log.velocity(policy, x, torch.full((len(x),), sigma), prompts, torch.full((len(x),), prompt))
        return log.repeated(small_recipe())

    assert run(x) == run(x[:1], sigma=0.25) == []
    assert run(x[:1], name="elsewhere") == []
    # the unconditional row is of every prompt
    assert run(x[:1], prompt=1) == [Repeated(ROLLOUT, ROLLOUT, 1, None)]
    assert run(x[1:]) == [Repeated(ROLLOUT, ROLLOUT, 3, None)]
    (master, *_) = policy.weights.trainable().values()
    kept = master.detach().clone()
    with torch.no_grad():
        master.view(-1)[0] += 1
        assert run(x) == [Repeated(ROLLOUT, ROLLOUT, 3, None)]
        master.copy_(kept)
    assert run(x[:1]) == [Repeated(ROLLOUT, ROLLOUT, 5, None)]
    with span("iteration 0/reward"):
        log.decode(policy, x)
        log.decode(policy, x[1:])
    assert log.repeated(small_recipe())[-1] == Repeated(DECODING, DECODING, 1, None)


def test_the_command_lists_them(tmp_path):
    recipe = tiny_recipe(tmp_path, engine={"reuse_rollout_graph": False})
    told = succeed("profile", recipe, "--equal-rows").stdout
    assert "rollout 26 rows" in told  # two prompts: the root, then 4 nodes at 3 steps
    assert "6 rows of rollout again in update 0: no update before it has trained" in told
    kept = succeed("profile", recipe, "--equal-rows", "--set", "engine.reuse_rollout_graph=true").stdout
    assert "no row is computed twice" in kept
    assert "--json" in refuse("profile", recipe, "--equal-rows", "--json")
