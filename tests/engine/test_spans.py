"""Spans: one name for the profiler, for NVTX and for the stage timings."""

import time

import numpy as np
import pytest
import torch

from flowgrove import spans
from flowgrove.credit import assign_credit
from flowgrove.rollout.loop import rollout
from flowgrove.spans import Clock, span
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
        f"update/update {u}/{part}" for u in range(2) for part in ("transformer", "grpo_loss", "backward", "optimizer")
    } <= names


def test_the_clock_adds_up_what_a_stage_takes():
    clock = Clock(CPU)
    for _ in range(2):
        with clock("reward"):
            time.sleep(0.02)
    assert list(clock.seconds) == ["reward"]
    assert 0.04 <= clock.seconds["reward"] < 1


def test_without_nvtx_spans_still_work(monkeypatch):
    monkeypatch.setattr(spans, "_annotate", lambda: None)
    with span("alone"):
        assert spans._path.get() == "alone"
    assert spans._path.get() == ""
