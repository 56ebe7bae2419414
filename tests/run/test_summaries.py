"""What a metrics line tells of an iteration's rewards."""

import pytest
import torch

from flowgrove.run.summaries import reward_summary


def test_rewards_are_told_over_all_samples_and_within_prompts():
    """Two prompts of two samples and two rewards: one tells the second prompt's samples apart, the other none."""
    scores = torch.tensor([[[1.0, 5.0], [1.0, 5.0]], [[2.0, 7.0], [4.0, 7.0]]], dtype=torch.float64)
    found = reward_summary(["one", "two"], [1.0, 2.0], scores)
    assert found["reward"]["one"] == pytest.approx({"mean": 2, "std": 1.5**0.5, "group_std": 0.5})
    assert found["reward"]["two"] == {"mean": 6, "std": 1, "group_std": 0}
    assert found["zero_std_ratio"] == 0.5


def test_a_prompt_trains_if_one_reward_tells_its_samples_apart():
    scores = torch.tensor([[[1.0, 5.0], [1.0, 6.0]]], dtype=torch.float64)
    for weight, ratio in ((-2.0, 0), (0.0, 1)):  # one that weighs nothing tells none apart
        assert reward_summary(["one", "two"], [1.0, weight], scores)["zero_std_ratio"] == ratio
