"""engine.ahead: the next prompts are encoded beside the update, and nothing that is trained changes."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from engine_cases import metrics_of, succeed, tiny_recipe, weights_of
from flowgrove import trainer
from flowgrove.models.embeddings import OffloadedEncoder
from flowgrove.models.policy import Policy
from flowgrove.rollout.ahead import Ahead
from flowgrove.update.updater import Updater
from policy_cases import CPU, TEXTS, policy_of, small_recipe


def same(one, other):
    return all(torch.equal(one.cond.tensors[name], tensor) for name, tensor in other.cond.tensors.items())


def test_what_was_begun_is_what_encoding_gives():
    policy, ahead = policy_of(guidance=2.0), Ahead(CPU)
    ahead.start(policy, TEXTS)
    found = ahead.take(policy, TEXTS)
    assert same(found, policy.encode(TEXTS))
    assert found.texts == TEXTS
    assert same(ahead.take(policy, TEXTS[:1]), policy.encode(TEXTS[:1])), "what was not begun is encoded now"


def test_it_is_encoded_in_another_thread_and_its_failure_is_left_to_whoever_takes_it(monkeypatch):
    policy, ahead, threads = policy_of(), Ahead(CPU), []

    def encode(self, texts):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise RuntimeError("no room")
        return encoded(self, texts)

    encoded = Policy.encode
    monkeypatch.setattr(Policy, "encode", encode)
    ahead.start(policy, TEXTS)
    assert same(ahead.take(policy, TEXTS), encoded(policy, TEXTS))
    assert [thread is threading.main_thread() for thread in threads] == [False, True]


def test_an_evaluation_waits_for_what_is_encoded(tmp_path, monkeypatch):
    """It asks the same encoders and the same autoencoder."""
    waiting, inner, encode = [], trainer.evaluate, Policy.encode

    def slow(self, texts):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        return encode(self, texts)

    def evaluate(*parts):
        waiting.append([future.done() for ahead in made for future in ahead._waiting.values()])
        return inner(*parts)

    made, begin = [], Ahead.__init__
    monkeypatch.setattr(Ahead, "__init__", lambda self, device: made.append(self) or begin(self, device))
    monkeypatch.setattr(Policy, "encode", slow)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    recipe = tiny_recipe(tmp_path, engine={"ahead": True}, run={"iterations": 2, "eval_every": 1})
    succeed("train", recipe, "--out", tmp_path / "run")
    assert waiting == [[], [True], []], "the second one begins while the next prompts are encoded"


def test_encoders_in_host_memory_stay_there():
    fetched, ahead = [], Ahead(CPU)
    ahead.start(replace(policy_of(), encoder=OffloadedEncoder(fetched.append, CPU)), TEXTS)
    ahead._thread.shutdown()
    assert fetched == []
    assert ahead._waiting == {}


@pytest.mark.parametrize("sizes", [None, pytest.param([[32, 32], [16, 48]], marks=pytest.mark.long)])
def test_a_run_is_the_same_and_encodes_during_its_updates(tmp_path, monkeypatch, sizes):
    encoded, updating, begun = [], threading.Event(), threading.Event()
    encode, update = Policy.encode, Updater.run

    def noted(self, texts):
        main = threading.current_thread() is threading.main_thread()
        encoded.append(main)
        if not main:
            assert updating.wait(20), "it waits for an update that has not begun"
            begun.set()
        return encode(self, texts)

    def while_updating(self, *parts):
        updating.set()
        if awaited.pop():
            assert begun.wait(20), "what is encoded ahead runs beside the update"
        try:
            return update(self, *parts)
        finally:
            updating.clear()
            begun.clear()

    monkeypatch.setattr(Policy, "encode", noted)
    monkeypatch.setattr(Updater, "run", while_updating)
    ends, awaited = [], []
    for ahead in (False, True):
        encoded.clear()
        awaited[:] = [False, ahead]  # the last iteration has none after it
        model = {} if sizes is None else {"sizes": sizes}
        recipe = tiny_recipe(
            tmp_path / str(ahead), model=model, engine={"ahead": ahead}, run={"iterations": 2, "eval_every": 0}
        )
        succeed("train", recipe, "--out", tmp_path / str(ahead) / "run")
        ends.append(weights_of(tmp_path / str(ahead) / "run", 2))
        each = 1 if sizes is None else 2
        assert encoded == ([True] * 2 * each if not ahead else [True] * each + [False] * each)
        assert len(metrics_of(tmp_path / str(ahead) / "run")) == 2
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.fixture
def on_gpu():
    device = torch.device("cuda")
    return Policy.load(small_recipe(model={"guidance_scale": 2.0}, engine={"device": "cuda"}), device), Ahead(device)


NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.mark.gpu
@NEEDS_A_GPU
def test_a_stream_of_its_own_encodes_while_another_one_is_busy(on_gpu, monkeypatch):
    (policy, ahead), begun, queued = on_gpu, threading.Event(), threading.Event()
    expected, encode = policy.encode(TEXTS), Policy.encode

    def noted(self, texts):
        begun.set()
        assert queued.wait(20)
        return encode(self, texts)

    torch.cuda.synchronize()
    monkeypatch.setattr(Policy, "encode", noted)
    ahead.start(policy, TEXTS)
    assert begun.wait(20)
    torch.cuda._sleep(4 * 10**9)  # cycles: seconds
    busy = torch.cuda.Event()
    busy.record()
    queued.set()
    found = ahead.take(policy, TEXTS)
    assert not busy.query(), "it waited for the other stream"
    assert same(found, expected)
    assert torch.equal(found.uncond_of, expected.uncond_of)
    assert all(torch.equal(found.uncond.tensors[name], tensor) for name, tensor in expected.uncond.tensors.items())


@pytest.mark.gpu
@NEEDS_A_GPU
def test_memory_of_what_was_handed_over_is_not_given_to_another_before_it_was_read(on_gpu):
    policy, ahead = on_gpu
    expected = {name: tensor.sum().item() for name, tensor in policy.encode(TEXTS).cond.tensors.items()}
    ahead.start(policy, TEXTS)
    found = ahead.take(policy, TEXTS)
    shapes = [(tensor.shape, tensor.dtype) for tensor in found.cond.tensors.values()]
    torch.cuda._sleep(10**9)
    sums = {name: tensor.sum() for name, tensor in found.cond.tensors.items()}  # behind the sleep
    del found
    with torch.cuda.stream(ahead._stream):
        others = [torch.full(shape, 7, dtype=dtype, device="cuda") for shape, dtype in shapes for _ in range(4)]
    assert {name: total.item() for name, total in sums.items()} == expected
    assert others
