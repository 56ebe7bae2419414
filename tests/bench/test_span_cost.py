"""The benchmark of what ranges cost: it compares iterations with all of them to iterations without any."""

import random
import runpy

import pytest

import flowgrove.rollout.loop
from flowgrove import spans
from flowgrove.models.prompts import Prompts
from flowgrove.rollout.loop import rollout
from flowgrove.spans import listening
from policy_cases import encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from subprocesses import ROOT

SCRIPT = runpy.run_path(str(ROOT / "profiling" / "span_cost.py"))


def ranges_of_a_rollout():
    recipe, policy = small_recipe(), policy_of(dtype="fp32")
    plan, rows = plan_and_coefficients(recipe)
    heard = []
    with listening(lambda one: heard.append(one.path) or SCRIPT["_NOTHING"]):
        rollout(plan, rows, policy, encoded(policy), runner_of(policy), seed=3, iteration=0)
    return heard


def test_without_ranges_there_are_none_and_then_they_are_back():
    span, count = spans.span, Prompts.tokens_of
    with_them = ranges_of_a_rollout()
    assert {"step 0", "step 0/transformer", "step 0/flow_step"} <= set(with_them)
    with SCRIPT["without_ranges"]():
        assert flowgrove.rollout.loop.span is not span
        assert ranges_of_a_rollout() == []
    assert (spans.span, flowgrove.rollout.loop.span, Prompts.tokens_of) == (span, span, count)
    assert ranges_of_a_rollout() == with_them


def test_a_row_says_what_was_measured():
    row = SCRIPT["measure"]("tiny", 1, 1, "cpu")
    assert set(row) == set(SCRIPT["COLUMNS"])
    assert (row["model"], row["prompts"], row["pairs"]) == ("tiny", 1, 1)
    assert row["ranges"] > 20
    percent = row["difference_us"] / row["without_ms"] / 10
    assert row["percent"] == pytest.approx(percent, abs=0.002)
    assert row["percent_low"] == row["percent"] == row["percent_high"]  # of one pair


def test_the_interval_holds_the_median_95_times_of_100():
    interval, chance = SCRIPT["interval_of_the_median"], random.Random(5)
    held = [low < 0.5 < high for low, high in (interval([chance.random() for _ in range(60)]) for _ in range(2_000))]
    assert 0.94 < sum(held) / len(held) < 0.97
    assert interval([1.0, 5.0, 2.0]) == (1.0, 5.0)
