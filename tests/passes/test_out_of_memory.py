"""A device that is too small: passes are halved, the work is repeated, and nothing else changes."""

import weakref

import numpy as np
import pytest
import torch
from torch.distributed import DistBackendError

from engine_cases import refuse, tiny_recipe
from flowgrove import ranks
from flowgrove.credit import assign_credit
from flowgrove.device import is_out_of_memory
from flowgrove.models.policy import Policy
from flowgrove.passes import out_of_memory
from flowgrove.passes.out_of_memory import (
    DROP_GRAPHS,
    FEWER_SAMPLES,
    FORGET_RECORDINGS,
    HALVE_PASSES,
    ORDER,
    Shrink,
    retry_smaller,
)
from flowgrove.rewards.python import PythonReward
from flowgrove.rollout.loop import rollout
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.update.passes import Rolled
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from update_cases import Recorder


class Small:
    """A device on which a pass of more than `rows` rows does not fit; `where`:
    in the forward of any pass, only with a graph, or in the backward.
    """

    def __init__(self, policy, rows, where, monkeypatch):
        self.failures, inner = 0, policy.adapter.velocity

        def fail():
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory")

        def velocity(x, *rest):
            graph = torch.is_grad_enabled()
            if len(x) > rows and (where == "forward" or (where == "training" and graph)):
                fail()
            v = inner(x, *rest)
            if len(x) > rows and where == "backward" and graph:
                v.register_hook(lambda gradient: fail())
            return v

        monkeypatch.setattr(policy.adapter, "velocity", velocity)


def fresh_policy():
    return Policy.load(small_recipe(), CPU)


def iteration(recipe, policy, retained=None):
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0, retained=retained)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    recorder = Recorder(recipe, policy)
    stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    return forest.leaves, torch.cat([g.flatten() for update in recorder.gradients for g in update]), stats


@pytest.mark.parametrize("where", ["forward", "training", "backward"])
@pytest.mark.parametrize("rows", [1, 5])
def test_passes_are_halved_until_they_fit_and_results_stay(where, rows, monkeypatch, caplog):
    recipe, policy = small_recipe(), fresh_policy()
    leaves, gradient, stats = iteration(recipe, policy_of())
    small = Small(policy, rows, where, monkeypatch)
    found, other, again = iteration(recipe, policy)
    assert 1 <= small.failures <= 5, "every attempt is half as large as the pass that failed"
    assert runner_of(policy).budget.tokens < runner_of(policy_of()).budget.tokens
    assert "engine.token_budget" in caplog.text
    assert torch.allclose(found, leaves, rtol=0, atol=1e-11)
    assert float((other - gradient).norm()) <= 1e-10 * float(gradient.norm())
    assert again.train_passes == stats.train_passes, "passes of the failed attempt do not count"
    assert len(torch.cat(again.ratio)) == len(torch.cat(stats.ratio))


def test_retained_graphs_are_given_up_before_passes_are_halved(monkeypatch):
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), fresh_policy()
    whole, (_, gradient, _) = runner_of(policy).budget.tokens, iteration(recipe, policy_of())
    failing = iter([False, True])  # the first graph is made, the second has no room
    inner = policy.adapter.velocity

    def velocity(x, *rest):
        if torch.is_grad_enabled() and next(failing, False):
            raise torch.OutOfMemoryError("out of memory")
        return inner(x, *rest)

    monkeypatch.setattr(policy.adapter, "velocity", velocity)
    retained = RetainedGraphs(10**6)
    _, other, _ = iteration(recipe, policy, retained)
    assert [one.velocity for one in retained.passes] == [None]
    assert runner_of(policy).budget.tokens == whole
    assert float((other - gradient).norm()) <= 1e-10 * float(gradient.norm())


def test_a_backward_without_room_gives_retained_graphs_up(monkeypatch):
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), fresh_policy()
    _, gradient, _ = iteration(recipe, policy_of())
    small = Small(policy, 5, "backward", monkeypatch)
    _, other, _ = iteration(recipe, policy, RetainedGraphs(10**6))
    assert small.failures >= 2, "once with the retained graph, once with a pass as large"
    assert float((other - gradient).norm()) <= 1e-10 * float(gradient.norm())


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_single_row_without_room_is_an_error(guidance, monkeypatch):
    policy = fresh_policy().guided_by(guidance)  # a row is then two of the transformer's
    Small(policy, 0, "forward", monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        iteration(small_recipe(), policy)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
@pytest.mark.parametrize("failing", [2, 3, pytest.param(5, marks=pytest.mark.long)])
def test_a_backward_that_fails_halfway_leaves_nothing_behind(dtype, failing, monkeypatch):
    """Neither gradients, of masters or copies, nor statistics:
    the repeated update is the one that never failed, cut as the repetition was.
    """
    recipe = small_recipe(engine={"device": "cpu", "token_budget": 140})  # 4 rows a pass: several passes per update
    found = []
    for fails in (True, False):
        policy = Policy.load(recipe_of(recipe, dtype), CPU)
        backwards, inner = [], policy.adapter.velocity

        def velocity(x, *rest, inner=inner, backwards=backwards, fails=fails):
            v = inner(x, *rest)
            if v.requires_grad:

                def count(gradient):
                    backwards.append(len(gradient))
                    if fails and len(backwards) == failing:
                        raise torch.OutOfMemoryError("out of memory")

                v.register_hook(count)
            return v

        monkeypatch.setattr(policy.adapter, "velocity", velocity)
        torch.manual_seed(0)
        prompts = encoded(policy)
        plan, rows = plan_and_coefficients(recipe)
        forest = rollout(plan, rows, policy, prompts, runner_of(policy, recipe), seed=1, iteration=0)
        if not fails:
            runner_of(policy).budget.resize(70)  # what the failed update was halved to
        credit = assign_credit(
            plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0]
        )
        recorder = Recorder(recipe, policy)
        stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
        found.append((torch.cat([g.flatten() for g in recorder.gradients[0]]), stats))
        assert len(backwards) > failing
    (gradient, stats), (expected, clean) = found
    assert float((gradient - expected).norm()) <= (2e-2 if dtype == "bf16" else 1e-5) * float(expected.norm())
    assert stats.train_passes == clean.train_passes
    assert len(torch.cat(stats.ratio)) == len(torch.cat(clean.ratio))


def recipe_of(recipe, dtype):
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def test_decoding_takes_fewer_samples_at_a_time(monkeypatch):
    policy = fresh_policy()
    latents = torch.randn(6, *policy.adapter.latent_shape, dtype=torch.float64)
    whole, sizes, inner = policy.decode(latents), [], policy.adapter.decode

    def decode(x):
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(x))
        return inner(x)

    monkeypatch.setattr(policy.adapter, "decode", decode)
    assert torch.allclose(runner_of(policy).decode(policy, latents), whole, rtol=0, atol=1e-12)
    assert max(sizes) <= 2


MEMORY = {
    "the allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuda": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "driver": RuntimeError("CUDA driver error: out of memory"),
    "nccl": DistBackendError(
        "NCCL error, unhandled cuda error, NCCL version 2.18.1\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\nFailed to CUDA calloc async 1920 bytes"
    ),
    "nccl's cuda": DistBackendError("ncclUnhandledCudaError: …\nLast error:\nCuda failure 2 'out of memory'"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
}
OTHERS = {
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    "cuda": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "resources": RuntimeError("out of resource: shared memory, Required: 300000"),
    "another kind": ValueError("CUDA error: out of memory"),
}


def test_full_memory_in_a_collective_is_no_lost_rank():
    assert not any(ranks._is_lost(MEMORY[name]) for name in ("nccl", "nccl's cuda"))
    assert ranks._is_lost(DistBackendError("NCCL communicator was aborted on rank 0"))


@pytest.mark.parametrize("name", MEMORY)
def test_exhausted_memory_is_known_by_every_name(name):
    assert is_out_of_memory(MEMORY[name])
    errors, shrunk = iter([MEMORY[name]]), []

    def work():
        for error in errors:
            raise error
        return "done"

    assert retry_smaller(work, lambda: shrunk.append(1) or True) == "done"
    assert shrunk == [1]


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors_are_raised_at_once(name):
    assert not is_out_of_memory(OTHERS[name])

    def work():
        raise OTHERS[name]

    with pytest.raises(type(OTHERS[name])) as caught:
        retry_smaller(work, lambda: pytest.fail("nothing to make smaller"))
    assert caught.value is OTHERS[name]


def test_a_failed_attempts_tensors_are_gone_before_the_next(monkeypatch):
    """Also those that frames of a replaced error hold."""
    alive = []

    def work():
        assert [ref() for ref in alive] == [None] * len(alive)
        tensor = torch.ones(3)
        alive.append(weakref.ref(tensor))
        try:
            raise RuntimeError("the capture failed")
        except RuntimeError:
            raise torch.OutOfMemoryError("out of memory") from None

    with pytest.raises(torch.OutOfMemoryError):
        retry_smaller(work, lambda: len(alive) < 3)
    assert len(alive) == 3


@pytest.mark.parametrize("name", MEMORY)
def test_a_command_says_what_to_lower(name, monkeypatch, tmp_path):
    def fail(*arguments):
        raise MEMORY[name]

    monkeypatch.setattr("flowgrove.tuning.tune.tune_recipe", fail)
    assert "lower engine.token_budget" in refuse("tune", tiny_recipe(tmp_path))


def test_a_python_reward_without_room_is_not_a_mistake_in_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWGROVE_ALLOW_PYTHON", "1")
    file = tmp_path / "reward.py"
    file.write_text("import torch\ndef score(pictures, prompts):\n    raise torch.OutOfMemoryError('out of memory')\n")
    with pytest.raises(torch.OutOfMemoryError):
        PythonReward(str(file))(torch.zeros(1, 3, 4, 4), ["a circle"])


def test_remedies_are_taken_in_order_and_recordings_forgotten_at_every_failure():
    """Whatever order a stage names them in."""
    left, taken = {DROP_GRAPHS: 1, FORGET_RECORDINGS: 99, HALVE_PASSES: 2, FEWER_SAMPLES: 1}, []

    def give(remedy):
        taken.append(remedy)
        left[remedy] -= 1
        return left[remedy] >= 0

    shrink = Shrink({remedy: lambda remedy=remedy: give(remedy) for remedy in reversed(ORDER)})
    found = []
    while shrink():
        found.append([remedy for remedy in taken if left[remedy] >= 0])
        taken.clear()
    assert found == [
        [DROP_GRAPHS, FORGET_RECORDINGS],
        [FORGET_RECORDINGS, HALVE_PASSES],
        [FORGET_RECORDINGS, HALVE_PASSES],
        [FORGET_RECORDINGS, FEWER_SAMPLES],
    ]
    assert taken == list(ORDER), "at the end each is asked once more, and recordings are forgotten though nothing helps"


def test_forgetting_recordings_alone_is_no_reason_for_another_attempt():
    assert not Shrink({FORGET_RECORDINGS: lambda: True})()
    assert not Shrink({})()


def test_the_table_names_every_remedy():
    table = out_of_memory.__doc__
    places = [table.index(f"    {remedy.name} ") for remedy in ORDER]
    assert places == sorted(places)
