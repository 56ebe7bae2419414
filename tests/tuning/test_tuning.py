"""Token budgets that are measured: the search, what is kept of it in the cache and in checkpoints, and the recipe that
`flowgrove tune` writes. No test looks at a real clock: measurements are made up, or only their form counts.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo import eval_frame

from checkpoint_cases import save_checkpoint
from engine_cases import refuse, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.models.blocks import blocks_of
from flowgrove.models.families.sd3 import SD3
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.models.weights import Weights
from flowgrove.passes.budget import PassBudget
from flowgrove.plan.division import Division
from flowgrove.plan.flops import count_flops
from flowgrove.plan.identity import Identity
from flowgrove.rates.kept import rates_of
from flowgrove.recipe.loading import load_recipe
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.resume import remember_budget, remembered_budget, stored_budget
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.tuning import checkpointing, model_times, token_budget, tune
from flowgrove.tuning.choosing import Candidate, choose
from flowgrove.tuning.pass_times import Passes, Timed, Work
from flowgrove.tuning.token_budget import (
    cache_budget,
    cache_key,
    cached_budget,
    fastest_rows,
    measured_budget,
    settle_meetings,
    settle_token_budget,
)
from flowgrove.update.updater import Updater
from policy_cases import CPU, plan_and_coefficients, policy_of, runner_of, small_recipe
from tiny_families import MODELS

WORK = Work(forwards=100, passes=30, widest=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache file of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flowgrove" / "budgets.json"


def on_device(seconds, room):
    """A measure by `seconds(rows)` where more than `room` rows do not fit, and the list of what it was asked."""
    asked = []

    def measure(rows):
        asked.append(rows)
        if rows > room:
            raise torch.OutOfMemoryError("out of memory")
        return seconds(rows)

    return measure, asked


# The search

SEARCHES = {
    "the faster the larger": (lambda rows: 1 / rows, 10**6, 64, 64, [1, 2, 4, 8, 16, 32, 64]),
    "no larger than what there is": (lambda rows: 1 / rows, 10**6, 50, 32, [1, 2, 4, 8, 16, 32]),
    "no room for 16": (lambda rows: 1 / rows, 12, 64, 8, [1, 2, 4, 8, 16]),
    "a plateau from 4 on": (lambda rows: 1 / min(rows, 4), 10**6, 64, 4, [1, 2, 4, 8]),
    "the last step gains too little": (lambda rows: {1: 1.0, 2: 0.5, 4: 0.495}[rows], 10**6, 64, 2, [1, 2, 4]),
    "slower from 4 on": (lambda rows: {1: 1.0, 2: 0.5, 4: 0.6}[rows], 10**6, 64, 2, [1, 2, 4]),
    "one row is as fast as any": (lambda rows: 1.0, 10**6, 64, 1, [1, 2]),
    "a single row": (lambda rows: 1.0, 10**6, 1, 1, [1]),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_fewest_rows_that_are_as_fast_as_the_fastest(name):
    seconds, room, most, expected, tried = SEARCHES[name]
    measure, asked = on_device(seconds, room)
    assert fastest_rows(measure, most) == expected
    assert asked == tried


def test_no_room_for_a_row_is_one_line_that_says_what_to_do():
    measure, _ = on_device(lambda rows: 1.0, 0)
    with pytest.raises(UserError, match=r"set model\.gradient_checkpointing: offload") as caught:
        fastest_rows(measure, 64)
    assert "\n" not in str(caught.value)


def test_work_is_that_of_the_first_iteration():
    recipe = small_recipe()
    counts = plan_and_coefficients(recipe)[0].counts
    assert Work.of(Setup(recipe)) == (3 * counts.rollout_forwards, 3 * counts.train_passes, 3 * counts.leaves)
    alone = Work.of(Setup(small_recipe(engine={"share": False})))
    assert alone == (3 * counts.unshared_rollout_forwards, 3 * counts.unshared_train_passes, 3 * counts.leaves)
    assert WORK.seconds(Timed(0.5, 2.0)) == 110


# Passes of a real model


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_budget_holds_the_rows_that_fit_and_leaves_nothing_behind(guidance, monkeypatch):
    policy = policy_of(dtype="bf16" if guidance == 1 else "fp32", guidance=guidance)  # bf16: with masters
    inner, of_a_row = policy.adapter.velocity, 2 if guidance != 1 else 1
    before = torch.get_rng_state()

    def velocity(x, *rest):
        if len(x) > 5 * of_a_row and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return inner(x, *rest)

    monkeypatch.setattr(policy.adapter, "velocity", velocity)
    if guidance == 1:  # predicting takes seconds: once is enough
        monkeypatch.setattr(token_budget, "room_beside", lambda setup, policy, division: torch.empty(0))
    monkeypatch.setattr(token_budget, "NEAR", -10.0)  # every doubling gains enough ...
    monkeypatch.setattr(token_budget, "first_near_best", max)  # ... and the largest is taken: no clock decides
    tokens = measured_budget(Setup(small_recipe()), policy, runner_of(policy))
    assert tokens == 4 * int(policy.encode(["a red circle"]).tokens[0]) == 4 * runner_of(policy).budget.row * of_a_row
    assert all(
        parameter.grad is None for parameter in (*policy.weights.trainable().values(), *policy.transformer.parameters())
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_passes_are_what_training_runs(monkeypatch):
    policy, rows = policy_of(dtype="fp32"), []
    inner = policy.adapter.velocity
    monkeypatch.setattr(
        policy.adapter, "velocity", lambda x, *rest: rows.append((len(x), torch.is_grad_enabled())) or inner(x, *rest)
    )
    passes = Passes(policy, runner_of(policy))
    timed = passes.timed(3, repeats=3)
    assert rows == [(3, False)] * 4 + [(3, True)] * 4  # one more to warm up
    assert timed.forward > 0 < timed.train
    assert any(bool(parameter.grad.any()) for parameter in policy.weights.trainable().values())
    passes.release()


# Where a run's budget comes from


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a policy on a GPU and its runner, which is measured at 777 tokens; and how often it was."""
    asked = []
    monkeypatch.setattr(
        token_budget, "measured_budget", lambda setup, policy, runner, division: asked.append(setup) or 777
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device.type + " 1")
    return SimpleNamespace(device=torch.device("cuda"), budget=PassBudget(5, 1, 1), asked=asked)


def test_a_gpu_is_measured_once(gpu):
    for seed in (1, 2):
        gpu.budget.resize(5)
        settle_token_budget(Setup(small_recipe(run={"seed": seed})), gpu, gpu, None)
        assert gpu.budget.tokens == 777
    assert len(gpu.asked) == 1
    settle_token_budget(Setup(small_recipe(rollout={"steps": 6})), gpu, gpu, None)
    assert len(gpu.asked) == 2


def test_a_checkpoint_goes_before_cache_and_measurement_and_the_recipe_before_all(gpu):
    settle_token_budget(Setup(small_recipe()), gpu, gpu, 60)
    assert gpu.budget.tokens == 60
    settle_token_budget(Setup(small_recipe(engine={"token_budget": 5})), gpu, gpu, 70)
    assert gpu.budget.tokens == 60
    assert gpu.asked == []


def test_a_cpu_is_never_measured(gpu):
    gpu.device = CPU
    settle_token_budget(Setup(small_recipe()), gpu, gpu, None)
    assert (gpu.budget.tokens, gpu.asked) == (5, [])
    settle_token_budget(Setup(small_recipe()), gpu, gpu, 60)
    assert gpu.budget.tokens == 60


# The cache


def test_the_cache_tells_recipes_and_devices_apart(cache):
    mine, other = cache_key(small_recipe(), "GPU A"), cache_key(small_recipe(), "GPU B")
    assert mine == cache_key(small_recipe(run={"iterations": 7}), "GPU A")
    assert len({mine, other, cache_key(small_recipe(engine={"compile": True}), "GPU A")}) == 3
    hybrid = small_recipe(run={"eval": {"tuned_share": 0.8}})
    assert cache_key(hybrid, "GPU A") != mine, "it holds a copy of the untouched model"
    assert cached_budget(mine) is None
    cache_budget(mine, 100)
    cache_budget(other, 200)
    assert (cached_budget(mine), cached_budget(other)) == (100, 200)
    assert set(json.loads(cache.read_text())) == {mine, other}


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"mine": "many"}', '{"mine": 0}', "\x00"])
def test_a_damaged_cache_is_ignored_and_rewritten(cache, damage):
    cache.parent.mkdir(parents=True)
    cache.write_text(damage)
    assert cached_budget("mine") is None
    cache_budget("mine", 100)
    assert cached_budget("mine") == 100


def test_a_cache_that_cannot_be_written_is_a_warning(cache, caplog):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    assert cached_budget("mine") is None
    cache_budget("mine", 100)
    assert "measures engine.token_budget again" in caplog.text


# Checkpoints


def test_a_resumed_run_has_the_passes_of_its_first_part(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 3, "eval_every": 0})
    run, own = tmp_path / "run", Setup(load_recipe(recipe)).fingerprint
    succeed("train", recipe, "--out", run, "--set", "engine.token_budget=70", "--set", "run.iterations=1")
    first = run / "checkpoints" / "step_000001"
    assert stored_budget(first, own) == 70
    assert stored_budget(first, "of another recipe") is None
    assert stored_budget(None, own) is None
    trainer = Trainer(Setup(load_recipe(recipe)), run)
    assert trainer.runner.budget.tokens == 70
    assert Trainer(Setup(load_recipe(recipe, ("engine.token_budget=80",))), run).runner.budget.tokens == 80
    trainer.runner.budget.resize(50)  # as halving leaves it
    trainer.run()
    assert stored_budget(run / "checkpoints" / "step_000003", own) == 50


@pytest.mark.parametrize("tokens", [(300, 200), (200, 300)])
def test_of_ranks_whose_memory_is_full_at_once_the_smaller_budget_stays(tmp_path, tokens):
    assert remembered_budget(tmp_path) is None
    for each in tokens:
        remember_budget(tmp_path, each)
    assert remembered_budget(tmp_path) == 200
    (tmp_path / "token_budget.json").write_text('{"tokens": 100}')  # as earlier versions wrote it
    assert remembered_budget(tmp_path) == 100
    (tmp_path / "token_budget_50.json").write_text("{")
    assert remembered_budget(tmp_path) == 100


def test_a_checkpoint_from_before_budgets_were_stored_still_loads(tmp_path):
    recipe = small_recipe()
    policy = Policy.load(recipe, CPU)
    checkpoint = save_checkpoint(
        tmp_path, policy, Updater(recipe, policy, runner_of(policy, recipe)), 1, "print", 3, {}
    )
    file = checkpoint / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("token_budget") == 4096
    file.write_text(json.dumps(state))
    assert stored_budget(checkpoint, "print") is None
    assert load_checkpoint(checkpoint, policy, None) == (1, {})


# flowgrove tune


def measured(name, rows, asked=None):
    def measure():
        if asked is not None:
            asked.append(name)
        if isinstance(rows, Exception):
            raise rows
        return rows

    return Candidate(name, name, measure)


def test_candidates_are_measured_in_turn_and_the_first_near_the_best_is_taken():
    asked = []
    candidates = [
        measured("slow", Timed(2e-3, 3e-3), asked),
        measured("near", Timed(1.02e-3, 2e-3), asked),
        measured("best", Timed(1e-3, 2e-3), asked),
    ]
    key, value, lines, _ = choose("attention", candidates, WORK, ("a note",))
    assert (key, value) == ("attention", "near")
    assert asked == ["slow", "near", "best"] * 4
    assert lines == ["slow: 2 + 3 ms, 0.29 s", "near: 1.02 + 2 ms, 0.162 s, chosen", "best: 1 + 2 ms, 0.16 s", "a note"]


def test_candidates_that_do_not_run_are_said_and_not_asked_again():
    asked = []
    failing = [
        measured("large", torch.OutOfMemoryError("no"), asked),
        measured("broken", RuntimeError("no kernel\nfor this"), asked),
    ]
    choice = choose("attention", [*failing, measured("plain", Timed(1e-3, 1e-3))], WORK)
    assert choice.value == "plain"
    assert asked == ["large", "broken"]
    assert choice.lines[:2] == ["large: does not fit into the memory", "broken: fails: no kernel"]
    with pytest.raises(UserError, match="does not hold a training pass"):
        choose("token_budget", failing[:1], WORK)
    with pytest.raises(UserError, match=r"engine\.attention: nothing that was tried runs here"):
        choose("attention", failing[1:], WORK)
    with pytest.raises(UserError, match=r"model\.gradient_checkpointing: nothing that was tried runs here"):
        choose("gradient_checkpointing", failing[1:], WORK, section="model")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("engine.cuda_graphs: it cannot be recorded"), "fails: engine.cuda_graphs: it cannot be recorded"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it"), "does not fit into the memory"),
    ],
)
def test_what_cannot_be_recorded_is_not_chosen(error, line):
    launched = Candidate(False, "launched", lambda: Timed(1e-3, 1e-3))
    choice = choose("cuda_graphs", [launched, measured("recorded", error)], WORK)
    assert (choice.value, choice.lines[1]) == (False, f"recorded: {line}")


def test_tune_writes_a_recipe_that_extends_the_old_one_and_trains(tmp_path):
    recipe = tiny_recipe(
        tmp_path, engine={"device": "cpu", "exact_replay": True}, run={"iterations": 1, "eval_every": 0}
    )
    result = succeed("tune", recipe)
    written = tmp_path / "mine_tuned.yaml"
    assert str(written) in result.stderr
    old, new = load_recipe(recipe), load_recipe(written)
    assert new.model_dump(exclude={"engine", "run"}) == old.model_dump(exclude={"engine", "run"})
    assert new.run.model_dump(exclude={"out"}) == old.run.model_dump(exclude={"out"})
    assert new.engine.model_dump(exclude={"token_budget", "attention"}) == old.engine.model_dump(
        exclude={"token_budget", "attention"}
    )
    assert new.engine.token_budget in [35 * rows for rows in (1, 2, 4, 8)]  # 2 prompts of 4 leaves
    assert new.engine.attention == "sdpa"
    assert Setup(new).fingerprint == Setup(old).fingerprint, "it goes on with the runs of the old one"
    text = written.read_text()
    assert "extends: mine.yaml" in text
    assert [f"# {rows} × 35 tokens: " in text for rows in (1, 2, 4, 8, 16)] == [True] * 4 + [False]
    assert torch.__version__ in text
    assert "not measured: give --compile" in text
    (kept,) = rates_of(CPU).models.values()
    assert (kept.architecture, kept.settings) == (Identity.of(old).architecture, Identity.of(old).settings)
    assert {kind: set(curve.seconds) for kind, curve in kept.passes.items()} == {
        "forward": {1, 2, 4, 8}, "kept": {1, 2, 4, 8}, "backward": {1, 2, 4, 8}, "decode": {1, 128},
    }  # fmt: skip
    assert min(kept.update, kept.encode, *kept.score.values()) > 0
    assert kept.trained == Setup(old).memory("cpu").sizes.trained
    told = succeed("plan", written, "--time").stdout
    assert told.count(f": this model, measured by tune on {kept.date}") == 5
    assert "not predicted: loading, checkpoints" in told
    succeed("train", written, "--out", tmp_path / "run")


def test_what_no_memory_is_left_for_is_said_and_the_rest_is_kept(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, engine={"device": "cpu", "token_budget": 35, "attention": "sdpa"})

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    states = Passes.states
    for place in ("model_times.matrix_rate", "model_times.copy_rate", "model_times._Measuring._stepped"):
        monkeypatch.setattr(f"flowgrove.tuning.{place}", full)
    monkeypatch.setattr(SD3, "encode", full)
    monkeypatch.setattr(Passes, "states", lambda self, rows: full() if rows == 128 else states(self, rows))
    said = []
    written = tune.tune_recipe(recipe, ("engine.token_budget=35", "engine.attention=sdpa"), None, False, said.append)
    assert [line for line in said if "not kept" in line] == [
        f"not kept: {part}, which does not fit into the memory"
        for part in (
            "the decode of 128 samples", "the encoding of prompts", "the optimiser's step",
            "the rate of matrix products", "the rate of copies",
        )
    ]  # fmt: skip
    assert load_recipe(written).engine.token_budget == 35
    kept = rates_of(CPU)
    assert (kept.matrix, kept.copied) == ({}, None)
    (times,) = kept.models.values()
    assert (times.update, times.encode, set(times.passes["decode"].seconds)) == (None, None, {1})
    assert {"forward", "kept", "backward"} < set(times.passes)


def test_the_recipe_is_written_before_anything_is_measured_for_plan(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "keep_times", stopped)
    overrides = ("engine.device=cpu", "engine.token_budget=35", "engine.attention=sdpa")
    with pytest.raises(KeyboardInterrupt):
        tune.tune_recipe(tiny_recipe(tmp_path), overrides, None, False, print)
    assert load_recipe(tmp_path / "mine_tuned.yaml").engine.token_budget == 35


def test_what_is_set_by_hand_is_kept_and_written_down(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        rollout={
            "steps": 4,
            "shift": 1.0,
            "group_size": 4,
            "window": {"strategy": "progressive", "size": 2, "stride": 2},
        },
    )
    (tmp_path / "other.txt").write_text("a red circle at the centre\n")
    options = [
        "engine.token_budget=70", "engine.exact_replay=true", "rollout.window={strategy: frozen, size: 3}",
        "data.prompts=other.txt", "model.lora.rank=2", "model.lora.alpha=4", "reward.0.weight=2",
    ]  # fmt: skip
    written = tmp_path / "elsewhere" / "tuned.yaml"
    succeed("tune", recipe, "--out", written, *[part for option in options for part in ("--set", option)])
    found, wanted = load_recipe(written), load_recipe(recipe, tuple(options))
    assert "extends: ../mine.yaml" in written.read_text()
    assert found.model_dump(exclude={"engine", "run"}) == wanted.model_dump(exclude={"engine", "run"})
    assert found.rollout.window.stride == 1, "a section given as a whole takes the place of the recipe's"
    assert (found.engine.token_budget, found.engine.exact_replay) == (70, True)
    assert "× 35 tokens" not in written.read_text(), "nothing is measured in its place"


@pytest.mark.parametrize(("cheap", "expected"), [(0.2, "int8"), (5.0, None)])
def test_rollouts_in_8_bits_are_chosen_where_their_passes_are_faster(cheap, expected, tmp_path, monkeypatch):
    """A forward takes 1 s, a training pass 3 s; two of the four steps train, so that 8 of 13 forwards are cheap."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    recipe = tiny_recipe(tmp_path, engine={"device": "cpu", "token_budget": 35, "attention": "sdpa"})

    def seconds(self, run, rows, repeats=1):
        if run == self.train:
            return 3.0
        return 1.0 if self.policy.adapter.transformer is self.policy.transformer else cheap

    monkeypatch.setattr(Passes, "seconds_per_row", seconds)
    monkeypatch.setattr(tune, "keep_times", lambda *_: None)
    overrides = ("engine.token_budget=35", "engine.attention=sdpa", "rollout.steps=4")
    written = tune.tune_recipe(recipe, overrides, None, False, print, with_precision=True)
    found = load_recipe(written)
    assert found.rollout.precision == expected
    assert found.rollout.steps == 4
    forwards, passes = 2 * 13, 2 * 6
    spent = forwards * (1 + 8 / 13 * (cheap - 1)) + passes * 3
    chosen = ", chosen" if expected == "int8" else ""
    assert f"# rollout.precision: int8: {1e3 * (1 + 8 / 13 * (cheap - 1)):.3g} + 3e+03 ms, {spent:.3g} s{chosen}\n" in (
        written.read_text()
    )


@pytest.mark.parametrize(("measured", "compiled"), [(False, True), (True, False)])
def test_rollouts_in_8_bits_are_compared_compiled_alike_and_with_their_attention(measured, compiled, monkeypatch):
    """A forward of steps that train takes 3 s, of the others 1 s with the attention that the recipe has for them."""
    asked = []
    monkeypatch.setattr("flowgrove.models.policy.compile_blocks", lambda *_: None)
    monkeypatch.setattr("flowgrove.models.policy.check_attention", lambda *_: None)  # sd3 has no other kernel
    monkeypatch.setattr(Weights, "cheapen", lambda self, *arguments: asked.append(arguments))
    monkeypatch.setattr(Policy, "cheap", lambda self: replace(self, precision="int8"))
    monkeypatch.setattr(Passes, "seconds_per_row", lambda self, *_, **__: 1.0 if self.policy.precision else 3.0)
    recipe = small_recipe(
        model={"dtype": "fp32"}, rollout={"attention": "sdpa"}, engine={"compile": True, "token_budget": 70}
    )
    fixed = {"token_budget": 70, "attention": "sdpa"}
    tuner = tune._Tuner(Setup(recipe), fixed, WORK, measured)
    asked.clear()  # what loading asked for
    lines = tuner.precision().lines
    assert {*asked[:-1]} == {(None, compiled, "sdpa"), ("int8", compiled, "sdpa")}
    assert asked[-1] == (None,)
    # of levels of 1, 1, 4, 4, 4 nodes the second and the third train
    assert [line.partition(": ")[2].partition(" + ")[0] for line in lines] == [f"{1e3 * (5 * 3 + 9) / 14:.3g}"] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_computed_again_is_chosen_by_its_passes_and_by_memory(compiled, tmp_path, monkeypatch):
    """Nothing computed again has no room; selectively takes 2 s instead of 3, compiled where blocks are."""
    recipe = tiny_recipe(tmp_path, engine={"device": "cpu", "token_budget": 35, "attention": "sdpa"})
    kinds, used, modes = {"full": 3.0, "selective": 2.0}, [], set()

    def seconds(self, run, rows, repeats=1):
        if used[-1] == "none":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kinds[used[-1]] if run == self.train else 1.0

    monkeypatch.setattr(Passes, "seconds_per_row", seconds)
    monkeypatch.setattr(tune, "checkpoint_blocks", lambda _, kind, mode: used.append(kind) or modes.add(mode))
    monkeypatch.setattr(tune, "keep_times", lambda *_: None)
    overrides = ("engine.token_budget=35", "engine.attention=sdpa", f"engine.compile={str(compiled).lower()}")
    found = load_recipe(tune.tune_recipe(recipe, overrides, None, False, print, with_checkpointing=True))
    assert found.model.gradient_checkpointing == used[-1] == "selective"
    assert modes == {compiled}
    text = (tmp_path / "mine_tuned.yaml").read_text()
    assert "# model.gradient_checkpointing: none: does not fit into the memory" in text


def test_a_recipe_whose_passes_fit_only_with_offload_keeps_it(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path, model={"gradient_checkpointing": "offload"}, engine={"device": "cpu"})
    used = []

    def seconds(self, run, rows, repeats=1):
        if used[-1] != "offload":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(Passes, "seconds_per_row", seconds)
    monkeypatch.setattr(tune, "checkpoint_blocks", lambda _, kind, mode: used.append(kind))
    monkeypatch.setattr(tune, "keep_times", lambda *_: None)
    overrides = ("engine.token_budget=35", "engine.attention=sdpa")
    found = load_recipe(tune.tune_recipe(recipe, overrides, None, False, print, with_checkpointing=True))
    assert found.model.gradient_checkpointing == used[-1] == "offload"


def test_flops_that_are_kept_are_those_of_the_setting_that_was_measured(monkeypatch):
    setup, kinds = Setup(small_recipe()), []
    monkeypatch.setattr(
        model_times, "count_flops", lambda recipe: kinds.append(recipe.model.gradient_checkpointing) or ["flops"]
    )
    monkeypatch.setattr(model_times._Measuring, "transformer", lambda *_: {})
    monkeypatch.setattr(model_times._Measuring, "decoding", lambda *_: {})
    tuned, policy = setup.computing_again("full").recipe, SimpleNamespace(device=CPU)
    model_times.keep_times(setup, tuned, policy, None, None, 1, print)
    assert (setup.recipe.model.gradient_checkpointing, kinds) == ("none", ["full"])


@pytest.mark.long
def test_attention_of_steps_that_do_not_train_is_chosen_where_it_is_near_and_fast(folders, monkeypatch):
    monkeypatch.setattr(tune, "attention_names", lambda: ["sdpa", "_native_math"])
    times = {}

    def seconds(self, run, rows, repeats=1):
        full = self.policy.adapter.transformer is self.policy.transformer or run == self.train
        return 1.0 if full else times["cheap"]

    monkeypatch.setattr(Passes, "seconds_per_row", seconds)
    recipe = small_recipe(model={**MODELS["flux"], "path": folders["flux"], "dtype": "fp32"})
    tuner = tune._Tuner(Setup(recipe), {"token_budget": 70, "attention": "sdpa"}, WORK, False)
    for times["cheap"], allowed, expected in ((0.2, 0.1, "_native_math"), (5.0, 0.1, None), (0.2, -1.0, None)):
        monkeypatch.setattr(tune, "_CHEAP_DIFFERENCE", allowed)
        choice = tuner.rollout_attention()
        assert (choice.section, choice.key, choice.value) == ("rollout", "attention", expected)
        told = next(line for line in choice.lines if line.startswith("_native_math"))
        assert ("left out" in told) == (allowed < 0)
        assert "its velocity is 0.00% of its norm away" in told
        assert tuner._cheap_attention == expected
        with pytest.raises(ValueError, match="no cheap copy"):
            tuner.policy.cheap()


def test_attention_of_steps_that_do_not_train_stays_where_the_recipe_has_one(monkeypatch):
    monkeypatch.setattr("flowgrove.models.policy.check_attention", lambda *_: None)  # sd3 has no other kernel
    setup = Setup(small_recipe(model={"dtype": "fp32"}, rollout={"attention": "sdpa"}))
    tuner = tune._Tuner(setup, {"token_budget": 70, "attention": "sdpa"}, WORK, False)
    assert tuner.rollout_attention() == ("attention", "sdpa", ["not measured: the recipe has one"], "rollout")


@pytest.mark.long
@pytest.mark.parametrize("fits", [True, False])
def test_forwards_in_8_bits_are_kept_beside_full_ones(fits, monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    recipe = small_recipe(model={"dtype": "fp32"}, rollout={"precision": "int8"})
    policy, ran, said = Policy.load(recipe, CPU), [], []
    runner = PassRunner.of(recipe, policy)

    def roll(self, _, x):
        if not fits and len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        ran.append((len(x), self.policy.precision))

    monkeypatch.setattr(Passes, "roll", roll)
    (flops,) = count_flops(recipe)
    measuring = model_times._Measuring(policy, runner, Passes(policy, runner), said.append)
    curves = measuring.cheap(recipe, flops, 3)
    assert {*ran} == {(rows, "int8") for rows in (1, 2, 3)[: 3 if fits else 2]}
    if fits:
        assert set(curves["forward in int8"].seconds) == {1, 2, 3}
        assert curves["forward in int8"].flops == flops.doubled * flops.forward
    else:
        assert (curves, said) == ({}, ["not kept: a forward in int8, which does not fit into the memory"])
    assert measuring.cheap(small_recipe(), flops, 3) == {}
    with pytest.raises(ValueError, match="no cheap copy"):
        policy.cheap()


def test_auto_is_settled_before_anything_is_measured(tmp_path, monkeypatch):
    """Computing nothing again is fastest and fits: what runs take for auto is what is measured and kept for plan."""
    monkeypatch.setattr(
        checkpointing, "needs", lambda *_: [checkpointing.Need(kind, 1, 1, 1.0, again, 1, 0) for kind, again in AGAIN]
    )
    used, kept = [], []
    monkeypatch.setattr(Passes, "__init__", lambda self, policy, runner: used.append(checkpointed(policy.transformer)))
    for part in ("token_budget", "attention"):
        monkeypatch.setattr(tune._Tuner, part, lambda self, part=part: tune.Choice(part, self.fixed[part], []))
    monkeypatch.setattr(tune._Tuner, "keep", lambda self, setup, *_: kept.extend((setup.recipe, self.recipe)))
    recipe = tiny_recipe(tmp_path, engine={"device": "cpu"}, model={"gradient_checkpointing": "auto"})
    overrides = ("engine.token_budget=35", "engine.attention=sdpa")
    written = tune.tune_recipe(recipe, overrides, None, False, print)
    assert used == [False]
    assert [one.model.gradient_checkpointing for one in kept] == ["none"] * 2
    assert load_recipe(written).model.gradient_checkpointing == "auto"


def checkpointed(transformer):
    return any(getattr(module, "gradient_checkpointing", False) for module in transformer.modules())


AGAIN = (("full", 1.0), ("selective", 0.5), ("none", 0.0))


@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_selective_checkpoints_are_compiled_with_their_blocks_but_not_where_ranks_gather(monkeypatch, distributed):
    engine = {"token_budget": 70, "distributed": distributed}
    setup = Setup(small_recipe(model={"gradient_checkpointing": "selective"}, engine=engine))
    compiled, modes = [], []
    monkeypatch.setattr(tune, "compile_blocks", compiled.append)
    monkeypatch.setattr(tune, "checkpoint_blocks", lambda _, kind, mode: modes.append((kind, mode)))
    monkeypatch.setattr(Passes, "seconds_per_row", lambda *_, **__: 1.0)
    tuner = tune._Tuner(setup, {"token_budget": 70, "attention": "sdpa"}, WORK, True)
    choice = tuner.compiled()
    if distributed == "ddp":
        assert len(compiled) == 1
        assert modes == [("selective", True), ("selective", False)], "blocks that gain nothing are eager again"
        return
    line = "not measured: gradient_checkpointing: selective does not go with it and fsdp2; give --checkpointing, too"
    assert choice == ("compile", False, [line], "engine")
    assert compiled == []
    assert tuner.checkpointing().value == "full"
    assert "selective" not in dict(modes)
    tuner.compiled()
    assert len(compiled) == 1, "another value was chosen"


@pytest.mark.parametrize("wins", [False, True])
def test_blocks_stay_compiled_where_that_is_faster_and_else_are_eager_again(monkeypatch, wins):
    """By themselves, not by the compiler's stance: what a run compiles besides is timed compiled in either case."""
    setup = Setup(small_recipe(model={"gradient_checkpointing": "none"}, engine={"token_budget": 70}))
    stances = []

    def seconds(self, function, rows, *others):
        stances.append(eval_frame._stance.stance)
        return 2.0 if (stances[-1] == "force_eager") == wins else 1.0

    monkeypatch.setattr(Passes, "seconds_per_row", seconds)
    tuner = tune._Tuner(setup, {"token_budget": 70, "attention": "sdpa"}, WORK, True)
    assert tuner.compiled().value is wins
    assert {*stances} == {"force_eager", "default"}
    blocks = blocks_of(tuner.policy.transformer)
    assert [block._compiled_call_impl is not None for block in blocks] == [wins] * len(blocks)
    stances.clear()
    monkeypatch.setattr(tune, "keep_times", lambda *_: stances.append(eval_frame._stance.stance))
    tuner.keep(setup, [], print)
    assert stances == ["default"]


def test_an_existing_file_stays_as_it_is(tmp_path):
    recipe = tiny_recipe(tmp_path)
    for options, file in (((), tmp_path / "mine_tuned.yaml"), (("--out", recipe), recipe)):
        if not file.exists():
            file.write_text("mine")
        before = file.read_text()
        line = refuse("tune", recipe, *options)
        assert "--out" in line
        assert str(file) in line
        assert file.read_text() == before
    assert "did you mean iterations" in refuse(
        "tune", recipe, "--out", tmp_path / "new.yaml", "--set", "run.iteratons=2"
    )
    assert not (tmp_path / "new.yaml").exists()


def test_a_backend_that_computes_something_else_is_left_out(monkeypatch):
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "fp32"}, engine={"device": "cpu", "token_budget": 70}
    )
    monkeypatch.setattr(
        tune, "attention_names", lambda: ["exact", "quantised", "broken", "sdpa", "far_hub", "gone", "cudnn"]
    )
    monkeypatch.setattr(tune, "missing", lambda name, device: "not installed" if name == "gone" else None)
    used = ["sdpa"]
    monkeypatch.setattr(tune, "use_attention", lambda adapter, name, *_: used.append(name))
    inner = Policy.velocity

    def velocity(self, *arguments):
        if used[-1] == "broken":
            raise TypeError("takes no float32\nat all")
        found = inner(self, *arguments)
        return found._replace(v=found.v * (1.1 if used[-1] == "quantised" else 1.0))

    monkeypatch.setattr(Policy, "velocity", velocity)
    tuner = tune._Tuner(Setup(recipe), {"token_budget": 70}, WORK, False)
    choice = tuner.attention()
    assert choice.value in ("sdpa", "exact")
    assert choice.lines[2:] == [
        "cudnn: left out, its backward has ended runs with an illegal memory access",
        "quantised: left out, its velocity or gradient is not that of sdpa",
        "broken: fails: takes no float32",
    ]
    assert set(used) == {"sdpa", "exact", "quantised", "broken"}
    assert used[-1] == choice.value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_run_on_a_gpu_is_measured_and_kept_and_tuning_records_graphs(tmp_path, cache):
    recipe = tiny_recipe(tmp_path, engine={"device": "cuda"}, run={"iterations": 1, "eval_every": 0})
    succeed("train", recipe, "--out", tmp_path / "run")
    (found,) = json.loads(cache.read_text()).values()
    assert found in [35 * rows for rows in (1, 2, 4, 8)]
    assert (
        stored_budget(tmp_path / "run" / "checkpoints" / "step_000001", Setup(load_recipe(recipe)).fingerprint) == found
    )
    succeed("tune", recipe)
    text = (tmp_path / "mine_tuned.yaml").read_text()
    assert "recorded: " in text
    assert torch.cuda.get_device_name() in text
    succeed("train", tmp_path / "mine_tuned.yaml", "--out", tmp_path / "tuned")


@pytest.mark.parametrize(
    ("total", "wanted", "expected"),
    [
        (1 << 40, "auto", False), (1 << 40, True, True), (0, "auto", None),
    ],
)  # fmt: skip
def test_passes_that_are_meetings_are_predicted(total, wanted, expected, monkeypatch):
    """On a GPU no pass is run for it: ranks would have to agree on each."""
    engine = {"distributed": "fsdp2", "reshard_after_forward": wanted}
    setup, division = Setup(small_recipe(engine=engine)), Division(2, 2)
    found = []
    weights, runner = SimpleNamespace(reshard=found.append), SimpleNamespace(budget=PassBudget(1, 1, 1))
    policy = SimpleNamespace(
        device=torch.device("cuda"), weights=weights, bytes_when_loaded=0,
        adapter=SimpleNamespace(geometry=SimpleNamespace(tokens=20)),
    )  # fmt: skip
    monkeypatch.setattr(token_budget, "total_memory", lambda device: total)
    if expected is None:
        with pytest.raises(UserError, match="does not hold a training pass of one row"):
            settle_meetings(setup, policy, runner, None, division)
        return
    settle_meetings(setup, policy, runner, None, division)
    assert 16384 // 2 < runner.budget.tokens <= 16384
    assert found == [expected]
    predicted = runner.budget.tokens
    settle_meetings(setup, policy, runner, 777, division)
    assert runner.budget.tokens == 777
    settle_meetings(setup, policy, runner, 2 * predicted, division)
    assert runner.budget.tokens == predicted, "a checkpoint of more ranks, which had more room"


def test_attention_of_a_model_that_tells_of_no_processors_is_put_back(folders):
    model = {**MODELS["z_image"], "path": str(folders["z_image"]), "dtype": "fp32"}
    tuner = tune._Tuner(Setup(small_recipe(model=model)), {"token_budget": 70}, WORK, False)
    before = [block.attention.processor for block in tuner.policy.transformer.layers]
    tuner._use("sdpa")
    tuner._use("auto")
    assert [block.attention.processor for block in tuner.policy.transformer.layers] == before
