"""Warnings in words: each on lines that deserve it, none on lines just short of it, none on a healthy run."""

import json

import pytest

from engine_cases import tiny_recipe
from flowgrove.recipe.keys import find_key
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.findings import find
from flowgrove.run.metric_keys import find_metric
from report_cases import LINE
from subprocesses import ROOT

COUNT = 60
HEALTHY = LINE | {
    "ratio_min": 0.998, "ratio_max": 1.002, "ratio_mean": 0.99995, "approx_kl": 2e-7, "advantage_by_step": {"0": 0.8},
    "skipped_updates": 0, "dropped_prompts": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Its clip range is 1e-3."""
    return load_recipe(tiny_recipe(tmp_path_factory.mktemp("recipe")))


def reward(mean, std=0.25):
    return {"reward": {"shapes": {"mean": mean, "std": std}}}


def run_of(change, count=COUNT):
    """Healthy lines with a rising reward and held-out reward, with `change(n)` of each."""
    lines = []
    for n in range(count):
        wiggle = 0.02 * (-1) ** n
        held_out = {"eval_reward": 0.5 + n / 200, "eval_reward_confidence": 0.05} if n % 10 == 0 else {}
        lines.append(HEALTHY | {"iteration": n} | reward(0.5 + n / 200 + wiggle) | held_out | change(n))
    return lines


def falling(n, to, width=0.05):
    """Held-out reward that rises to 0.7 in the middle and falls to `to` at the last evaluation."""
    if n % 10:
        return {}
    value = 0.5 + n / 150 if n <= 30 else 0.7 - (n - 30) / 20 * (0.7 - to)
    return {"eval_reward": value, "eval_reward_confidence": width}


def late(n, value, before=None):
    return value if n >= COUNT - 10 else (before or {})


FOUND = {
    "overfitting": lambda n: falling(n, 0.6),
    "overfitting without intervals": lambda n: falling(n, 0.3, None) | ({"eval_reward": 0.71} if n == 40 else {}),
    "collapse": lambda n: falling(n, 0.6) | reward(0.7 - n / 200),
    "collapse into pictures that all score alike": lambda n: (
        reward(0.7 - n / 200)
        | falling(n, 0.7)
        | ({"eval_reward": 0.0, "eval_reward_confidence": 0.0} if n == 50 else {})
    ),
    "ratio": lambda n: {"ratio_mean": 1 - n / COUNT * 0.002},
    "ratio above": lambda n: late(n, {"ratio_mean": 1.0011}),
    "clipped": lambda n: late(n, {"clipped_low": 0.34}),
    "clipped on both sides": lambda n: {"clipped_low": 0.27, "clipped_high": 0.25},
    "spread": lambda n: late(n, {"train_passes": 0, "advantage_by_step": {}, "ratio_mean": None}),
    "spread of advantages": lambda n: {"advantage_by_step": {"0": 0.8 if n < 30 else 0.3, "1": 0.8 if n < 30 else 0.3}},
    "spread of rewards": lambda n: reward(0.5 + n / 200, 0.25 if n < 30 else 0.02),
    "spread within prompts": lambda n: late(n, {"zero_std_ratio": 0.6}),
    "kl": lambda n: {"approx_kl": 2e-7 * 10 ** (n / 25)},
    "drift": lambda n: {"logp_drift": 2e-3},
    "skipped": lambda n: {"skipped_updates": int(n % 8 == 0)},
    "dropped": lambda n: {"dropped_prompts": int(n % 8 == 0)},
    "saturated": lambda n: reward(min(0.9, 0.5 + n / 60) + 0.004 * (-1) ** n, max(0.08, 0.3 - n / 100)),
}
NOT_FOUND = {
    "nothing": lambda n: {},
    "a fall within the intervals": lambda n: falling(n, 0.64),
    "wide intervals": lambda n: falling(n, 0.6, 0.08),
    "no intervals, and a small fall": lambda n: falling(n, 0.62, None),
    "one bad evaluation that the next mends": lambda n: {"eval_reward": 0.2} if n == 30 else {},
    "a ratio at the edge of the range": lambda n: {"ratio_mean": 0.99901},
    "a single wild ratio": lambda n: {"ratio_mean": 0.9, "clipped_low": 0.9} if n == COUNT - 1 else {},
    "a third clipped": lambda n: {"clipped_low": 0.33, "clipped_high": 0.1},
    "a divergence that follows the window": lambda n: {"approx_kl": 1e-8 if n % 10 < 5 else 9e-7},
    "a large divergence from the beginning": lambda n: {"approx_kl": 5e-5},
    "one update an iteration": lambda n: {"approx_kl": 0.0, "ratio_mean": 1.0, "clipped_low": 0.0, "clipped_high": 0.0},
    "some idle iterations": lambda n: {"train_passes": 0, "advantage_by_step": {}} if n % 3 == 0 else {},
    "weaker advantages": lambda n: {"advantage_by_step": {"0": 0.8 if n < 30 else 0.4}},
    "prompts that are learnt": lambda n: {"zero_std_ratio": n / COUNT / 2},
    "some skipped, some dropped": lambda n: {"skipped_updates": int(n % 12 == 0), "dropped_prompts": int(n % 12 == 0)},
    "a reward that still rises": lambda n: reward(0.5 + n / 120 + 0.004 * (-1) ** n, max(0.08, 0.3 - n / 100)),
    "a reward that has not moved": lambda n: reward(0.5 + 0.004 * (-1) ** n, 0.25),
    "a level reward whose samples still differ": lambda n: reward(min(0.9, 0.5 + n / 60) + 0.004 * (-1) ** n, 0.2),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_deserves_a_warning_has_one_that_says_what_to_change(recipe, case):
    found = find(recipe, run_of(FOUND[case]))
    assert [finding.name for finding in found] == [case.split()[0]]
    (finding,) = found
    assert finding.kind == ("note" if case == "saturated" else "warning")
    assert find_metric(finding.metric)
    keys = [word.strip(".,;:()") for word in finding.action.split() if "." in word.strip(".,;:()")]
    assert keys
    assert all(find_key(key) for key in keys)


def test_evaluations_of_other_prompts_are_not_compared(recipe):
    assert find(recipe, run_of(FOUND["collapse"]), changed=True) == []


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_short_of_a_warning_has_none(recipe, case):
    assert find(recipe, run_of(NOT_FOUND[case])) == []


@pytest.mark.parametrize("case", FOUND)
def test_a_few_lines_are_not_judged(recipe, case):
    assert find(recipe, run_of(FOUND[case])[-9:]) == []


def test_a_warning_tells_the_numbers_that_it_saw(recipe):
    (finding,) = find(recipe, run_of(FOUND["overfitting"]))
    assert "0.7 after 30 iterations and is 0.6 now" in finding.text
    assert f"({(2 * 0.05**2) ** 0.5:.2g})" in finding.text


def test_in_bf16_a_drift_is_no_mistake(recipe):
    model = recipe.model.model_copy(update={"dtype": "bf16"})
    assert find(recipe.model_copy(update={"model": model}), run_of(FOUND["drift"])) == []


def test_warnings_come_before_notes(recipe):
    both = find(recipe, run_of(lambda n: FOUND["saturated"](n) | FOUND["clipped"](n)))
    assert [finding.name for finding in both] == ["clipped", "saturated"]


@pytest.mark.parametrize("lines", [12, 25, 40])
def test_a_real_healthy_run_has_no_warning(recipe, lines):
    """Of 40 iterations of MixGRPO on the embedded pipeline, whose clip range is 1e-3 too."""
    texts = (ROOT / "tests" / "fixtures" / "quickstart_metrics.jsonl").read_text().splitlines()
    assert find(recipe, [json.loads(text) for text in texts][:lines]) == []


def judged(n, before, after, confidence=0.02):
    """What evaluations tell of `judge`, which nothing trains on: it goes from one mean to the other."""
    mean = before + (after - before) * n / COUNT
    return {} if n % 10 else {"eval_rewards": {"judge": {"mean": mean, "confidence": confidence}}}


@pytest.mark.parametrize(
    ("before", "after", "trained", "found"),
    [
        (0.6, 0.4, {}, ["hacked"]),
        (0.4, 0.6, {}, []),
        (0.6, 0.58, {}, []),  # within its intervals
        (0.6, 0.4, {"eval_reward": 0.5}, []),  # what is trained on has not risen either
    ],
)
def test_a_reward_that_nothing_trains_on_and_that_falls_is_told(tmp_path, before, after, trained, found):
    rewards = [{"name": "jpeg_size", "label": "judge"}]
    recipe = load_recipe(tiny_recipe(tmp_path, run={"eval": {"rewards": rewards}}))
    lines = run_of(lambda n: judged(n, before, after) | (trained if n % 10 == 0 else {}))
    findings = find(recipe, lines)
    assert [finding.name for finding in findings] == found
    assert find(recipe, lines, changed=True) == []
    for finding in findings:
        assert f"judge was {before:g} after 0 iterations" in finding.text
