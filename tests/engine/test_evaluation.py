"""What an evaluation amounts to: means over prompts, and their confidence intervals."""

import pytest
import torch

from flowgrove.evaluation import Evaluated

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
