"""A run's set-up is made once: what is derived from the recipe is derived before the first iteration, and one time."""

from collections import Counter

import pytest

from engine_cases import TRAIN_PROMPTS, flowgrove, tiny_recipe, write_lines
from flowgrove import setup as derived
from flowgrove.data import prompts
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.plan import memory
from flowgrove.recipe.deciding import _OPERATION
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Engine
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.tuning import graph_room, token_budget
from flowgrove.update.updater import Updater
from policy_cases import CPU, runner_of, small_recipe


@pytest.fixture
def calls(monkeypatch):
    """How often what is slow, or may change between two calls, was done."""
    counted = Counter()

    def count(module, name, key):
        inner = getattr(module, name)

        def counting(*args, **kwargs):
            counted[key(*args)] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(
        derived, "make_plan", lambda recipe, iteration, table, splits=None: (iteration, recipe.rollout.window.strategy)
    )
    count(prompts, "read_prompts", lambda path, key, *_: key)
    count(derived, "recipe_sigmas", lambda recipe: ("table", recipe.rollout.window.strategy))
    count(memory.MemoryModel, "__init__", lambda model, *_: "memory model")
    count(memory.MemoryModel, "_training", lambda model, states: ("training", states))
    return counted


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Token budget and room for graphs are settled on the CPU as they are on a GPU."""

    def settle(setup, policy, runner, stored, division):
        runner.budget.resize(token_budget.measured_budget(setup, policy, runner, division))

    monkeypatch.setattr("flowgrove.trainer.settle_token_budget", settle)
    monkeypatch.setattr(graph_room, "_room_of_cpu", lambda *_: pytest.fail("asked the model itself"))
    of = graph_room.GraphRoom.of.__func__

    def as_on_a_gpu(cls, setup, policy, runner, division):
        monkeypatch.setattr(graph_room, "_room_of_cpu", lambda *both: graph_room._room_of_gpu(setup, *both, division))
        return of(cls, setup, policy, runner, division)

    monkeypatch.setattr(graph_room.GraphRoom, "of", classmethod(as_on_a_gpu))


def test_a_training_run_does_its_set_up_once(calls, like_a_gpu, tmp_path):
    """From the command's objects to the end of the first iteration, evaluations before and after it included."""
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 1})
    Trainer(Setup(load_recipe(recipe)), tmp_path / "run").run()
    plans = [key for key in calls if isinstance(key, tuple) and key[0] == 0]
    assert len(plans) == 2, "of training, and of evaluation"
    assert {"data.prompts", "data.eval_prompts", "memory model"} < set(calls)
    assert {key[0] for key in calls if isinstance(key, tuple)} == {0, "table", "training"}
    assert set(calls.values()) == {1}, calls


def test_the_command_hands_its_set_up_down(calls, tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 1})
    for number in (1, 2, 3):  # a new run, one that is finished, and that run made longer
        calls.clear()
        longer = ("--set", "run.iterations=2") if number == 3 else ()
        result = flowgrove("train", recipe, "--out", tmp_path / "run", *longer)
        assert result.exit_code == 0, result.stderr
        assert calls["data.prompts"] == 1
        assert set(calls.values()) == {1}, calls


def test_prompts_of_a_run_are_what_its_fingerprint_is_of(tmp_path):
    path = tiny_recipe(tmp_path)
    setup = Setup(load_recipe(path))
    own, read = setup.fingerprint, list(setup.prompts)
    write_lines(tmp_path / "train.txt", ["a prompt that came later"])
    assert (setup.fingerprint, setup.prompts) == (own, read)
    assert Setup(load_recipe(path)).fingerprint != own


def test_no_iteration_predicts_memory(calls, like_a_gpu, monkeypatch):
    """The room for graphs is known before an iteration's clock runs."""
    recipe = small_recipe()
    policy = Policy.load(recipe, CPU)  # its own, since it trains
    stages = Stages(Setup(recipe), policy, Updater(recipe, policy, runner_of(policy, recipe)), Rewards(recipe, CPU))
    assert calls["memory model"] == 1
    monkeypatch.setattr(memory.MemoryModel, "at", lambda *_: pytest.fail("predicted inside an iteration"))
    monkeypatch.setattr(graph_room.GraphRoom, "of", lambda *_: pytest.fail("settled inside an iteration"))
    stages.run(list(TRAIN_PROMPTS), 0)


def test_every_key_of_engine_decides_the_weights_or_does_not():
    """A new one has its place in one of both lists."""
    decide = {"share", "exact_replay"}  # other batches, which round otherwise
    assert set(Engine.model_fields) == decide | set(_OPERATION["engine"])
    assert not decide & set(_OPERATION["engine"])
