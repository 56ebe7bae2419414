"""What an evaluation amounts to: means over prompts, and their confidence intervals."""

import json

import pytest
import torch

from engine_cases import metrics_of, succeed, tiny_recipe
from flowgrove.evaluation import Evaluated
from flowgrove.rewards import registry
from flowgrove.rewards.faults import RewardError
from flowgrove.rewards.shapes import ShapesReward

NAN = float("nan")


def evaluated(scores):
    """Of pictures that nobody looks at."""
    return Evaluated(torch.zeros(len(scores), 3, 1, 1), ["a prompt"] * len(scores), torch.tensor(scores).double())


def test_a_prompt_counts_once_in_an_interval():
    """Two pictures of each of three prompts, whose means are 1, 2 and 6: their standard deviation is sqrt(7)."""
    found = evaluated([[0.0, 5], [2, 5], [2, 5], [2, 5], [5, 5], [7, 5]]).estimates(["one", "level"], [2.0, -1.0], 2)
    width = 1.96 * (7 / 3) ** 0.5
    assert list(found) == ["one", "level", "weighted_sum"]
    assert found["one"] == pytest.approx({"mean": 3, "confidence": width})
    assert found["level"] == {"mean": 5, "confidence": 0}
    assert found["weighted_sum"] == pytest.approx({"mean": 1, "confidence": 2 * width})


def test_prompts_without_a_score_are_left_out():
    scored = [[0.25], [0.5], [0.5], [0.25], [1.0], [0.75]]
    whole, holed = evaluated(scored), evaluated([*scored[:2], [NAN], [NAN], *scored[2:]])
    assert holed.estimates(["one"], [1.0], 2) == whole.estimates(["one"], [1.0], 2)
    assert holed.weighted([1.0]) == whole.estimates(["one"], [1.0], 2)["weighted_sum"]["mean"]


def test_of_one_prompt_the_spread_is_not_known_and_of_none_nothing():
    assert evaluated([[1.0], [2.0]]).estimates(["one"], [1.0], 2)["one"] == {"mean": 1.5, "confidence": 0}
    assert evaluated([[NAN], [NAN]]).estimates(["one"], [1.0], 2) == {}


def test_a_reward_that_only_evaluations_give_and_that_fails_costs_itself_alone():
    """Two pictures of each of two prompts; the second reward scored the first prompt alone."""
    whole = evaluated([[1.0, 5], [3, 7], [2, NAN], [4, NAN]])
    assert whole.weighted([2.0]) == 5
    found = whole.estimates(["one", "judge"], [2.0], 2)
    assert (found["one"]["mean"], found["judge"]["mean"], found["weighted_sum"]["mean"]) == (2.5, 6, 5)
    none = evaluated([[1.0, NAN], [3, NAN]])
    assert list(none.estimates(["one", "judge"], [2.0], 2)) == ["one", "weighted_sum"]


def test_a_judge_that_cannot_be_reached_leaves_the_held_out_reward(tmp_path, monkeypatch, caplog):
    class Down(ShapesReward):
        def __call__(self, pictures, prompts):
            raise RewardError("reward judge: nobody answers", unreachable=True)

    monkeypatch.setitem(registry._REWARDS, "down", Down)
    rewards = [{"name": "down", "label": "judge"}]
    recipe = tiny_recipe(tmp_path, run={"iterations": 1, "eval": {"rewards": rewards}})
    succeed("train", recipe, "--out", tmp_path / "run")
    line = metrics_of(tmp_path / "run")[-1]
    assert list(line["eval_rewards"]) == ["shapes"]
    assert line["eval_reward"] == pytest.approx(line["eval_rewards"]["shapes"]["mean"])
    assert any("nobody answers" in message for message in caplog.messages)


def test_rewards_that_only_evaluations_give_are_told_and_decide_nothing(tmp_path):
    rewards = [{"name": "shapes"}, {"name": "jpeg_size", "label": "kilobytes", "weight": -0.01}]
    judges = [{"name": "jpeg_size", "label": "judge", "quality": 50}]
    written = {}
    for name, judging in (("with", judges), ("without", [])):
        recipe = tiny_recipe(tmp_path, reward=rewards, run={"iterations": 1, "eval": {"rewards": judging}})
        succeed("train", recipe, "--out", tmp_path / name)
        written[name] = metrics_of(tmp_path / name)[-1]
    there, alone = (line["eval_rewards"] for line in written.values())
    assert (list(there), list(alone)) == (["shapes", "kilobytes", "judge"], ["shapes", "kilobytes"])
    assert list(written["with"]["reward"]) == ["shapes", "kilobytes"]
    assert there["judge"]["mean"] > there["kilobytes"]["mean"]  # minus kilobytes: more quality takes more
    for key in ("reward", "eval_reward", "grad_norm", "approx_kl"):
        assert written["with"][key] == written["without"][key]
    expected = there["shapes"]["mean"] - 0.01 * there["kilobytes"]["mean"]
    assert written["with"]["eval_reward"] == pytest.approx(expected)
    told = succeed("eval", tmp_path / "with").stdout
    assert "judge" in told
    found = json.loads((tmp_path / "with" / "eval.json").read_text())
    assert found["judge"] == pytest.approx(there["judge"])
    assert found["weighted_sum"]["mean"] == pytest.approx(expected)
