"""Spans: one name for the profiler, for NVTX and for the stage timings."""

import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from contextvars import copy_context

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from flowgrove import spans
from flowgrove.credit import assign_credit
from flowgrove.ranks import Ranks
from flowgrove.rollout.loop import rollout
from flowgrove.spans import COMMUNICATION, DECODE, TRANSFORMER, Clock, listening, span, span_totals, untimed
from flowgrove.update.passes import Rolled
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from update_cases import Recorder


def test_names_nest_and_end_with_their_block():
    with torch.profiler.profile() as profile, span("iteration"):
        with span("rollout"), span("step 7"), span("transformer"):
            pass
        with pytest.raises(RuntimeError), span("update"):
            raise RuntimeError
        with span("credit"):
            pass
    names = {event.name for event in profile.events()}
    assert {"iteration", "iteration/rollout/step 7/transformer", "iteration/update", "iteration/credit"} <= names


def test_stages_of_an_iteration_show_in_the_profiler():
    recipe, policy = small_recipe(), policy_of(dtype="fp32")
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    with torch.profiler.profile() as profile:
        with span("rollout"):
            forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=3, iteration=0)
        credit = assign_credit(
            plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0]
        )
        with span("update"):
            Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    names = {event.name for event in profile.events()}
    assert {f"rollout/step {step.index}/transformer" for step in plan.steps} <= names
    assert {
        f"update/update {u}/pass 0/{part}" for u in range(2) for part in ("transformer", "grpo_loss", "backward")
    } | {f"update/update {u}/optimizer" for u in range(2)} <= names


def test_the_clock_adds_up_what_a_stage_takes():
    clock = Clock(CPU)
    for _ in range(2):
        with clock("reward"):
            time.sleep(0.02)
    assert list(clock.seconds) == ["reward"]
    assert 0.04 <= clock.seconds["reward"] < 1


def test_a_listener_hears_of_every_range_that_begins_and_ends():
    heard = []

    @contextmanager
    def listener(one):
        heard.append(("begins", one.path, one.kind, one.rows, one.tokens, threading.current_thread().name))
        try:
            yield
        finally:
            heard.append(("ends", one.path))

    def beside():
        with span("decode", DECODE, 2):
            pass

    with span("before"), listening(listener):
        with span("step 7", rows=3), pytest.raises(RuntimeError), span("transformer", TRANSFORMER, 3, 12):
            raise RuntimeError
        with untimed(), span("recording"):
            pass
        thread = threading.Thread(target=copy_context().run, args=(beside,), name="rewards")
        thread.start()
        thread.join()
    with span("after"):
        pass
    assert heard == [
        ("begins", "before/step 7", "stage", 3, 0, "MainThread"),
        ("begins", "before/step 7/transformer", "transformer", 3, 12, "MainThread"),
        ("ends", "before/step 7/transformer"),
        ("ends", "before/step 7"),
        ("begins", "before/decode", "decode", 2, 0, "rewards"),
        ("ends", "before/decode"),
    ]


def test_several_listeners_and_totals_hear_of_the_same_ranges():
    paths = []
    with span_totals(CPU) as totals, listening(lambda one: paths.append(one.path) or nullcontext()):
        for _ in range(2):
            with span("update 0"), span("backward"):
                time.sleep(0.01)
    assert paths == ["update 0", "update 0/backward"] * 2
    assert list(totals.seconds) == ["update 0", "backward"]
    assert totals.seconds["update 0"] >= totals.seconds["backward"] >= 0.02


def test_collectives_are_communication(monkeypatch):
    heard = []
    gathered = []
    monkeypatch.setattr(dist, "all_gather", lambda found, mine, group: [part.copy_(mine) for part in found])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: gathered.append(tensor))
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    with listening(lambda one: heard.append((one.path, one.kind)) or nullcontext()):
        Ranks().gather(torch.ones(1))
        Ranks().sum_gradients([weight])
        assert heard == [], "a run of one process sends nothing"
        assert Ranks(0, 2).most(3) == 3
        Ranks(0, 2).sum_gradients([weight])
    assert heard[0] == ("gather", COMMUNICATION)
    assert heard[1] == ("sum_gradients", COMMUNICATION)
    assert set(heard[2:]) == {("sum_gradients/gather", COMMUNICATION)}
    assert len(gathered) == 2


def test_a_listener_that_fails_leaves_no_range_begun():
    def listener(one):
        raise OSError("no room")

    with span("outer"):
        with listening(listener), pytest.raises(OSError, match="no room"), span("inner"):
            pass
        assert spans._path.get() == "outer"


def test_without_a_tool_or_nvtx_spans_still_work(monkeypatch):
    assert spans._domain() is None
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert spans._domain.__wrapped__() is None
    with span("alone"):
        assert spans._path.get() == "alone"
    assert spans._path.get() == ""
