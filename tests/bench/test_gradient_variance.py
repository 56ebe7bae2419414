"""What profiling/gradient_variance.py tells of gradients: of drawn ones whose mean and covariance are known, and of a
few of its own.
"""

import pytest
import torch

import gradient_variance
from flowgrove.plan.planner import make_plan
from flowgrove.report.figures import pyplot
from gradient_variance import COLUMNS, CREDITS, ROLLOUTS, found, measure


def test_noise_and_cosine_are_those_that_the_gradients_were_drawn_with():
    """E = (2, 0, …), tr Cov = 6 · 3²; the truth points 60° away from E, with some noise of its own."""
    random = torch.Generator().manual_seed(0)
    mean, truth = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    mean[0], truth[0], truth[1] = 2.0, 0.5, 0.75**0.5
    plans = [make_plan(ROLLOUTS[1].load(()), position) for position in (0, 5)]
    drawn = mean + 3 * torch.randn(2, 5000, 6, dtype=torch.float64, generator=random)
    true = truth + 0.2 * torch.randn(50, 6, dtype=torch.float64, generator=random)
    row = found(plans, 12, drawn, true, mean.expand(50, 6))
    counts = plans[0].counts
    assert row["cost"] == 12 * (counts.rollout_forwards + 3 * counts.train_passes)
    assert row["iterations"] == 10_000
    for name, expected in (("passes_to_signal", row["cost"] * 54 / 4), ("cosine", 0.5), ("cosine_ode", 1.0)):
        assert abs(row[name] - expected) < 4 * row[f"{name}_error"]
        assert row[f"{name}_error"] < 0.1 * expected


def test_errors_are_the_spread_between_repeated_measurements():
    random = torch.Generator().manual_seed(1)
    plans, mean = [make_plan(ROLLOUTS[0].load(()), 0)], torch.arange(6, dtype=torch.float64)
    rows = []
    for _ in range(200):
        drawn = mean + 5 * torch.randn(1, 200, 6, dtype=torch.float64, generator=random)
        true = mean.flip(0) + 2 * torch.randn(50, 6, dtype=torch.float64, generator=random)
        rows.append(found(plans, 12, drawn, true, true))
    for name in ("passes_to_signal", "cosine"):
        values, errors = (torch.tensor([float(row[key]) for row in rows]) for key in (name, f"{name}_error"))
        assert float(errors.square().mean() ** 0.5) == pytest.approx(float(values.std()), rel=0.3)


def test_rows_are_drawn_and_say_how_they_came_about(monkeypatch, tmp_path):
    from doc_figures.gradient_variance import plot

    monkeypatch.setattr(gradient_variance, "ROLLOUTS", [ROLLOUTS[2], ROLLOUTS[3]])
    monkeypatch.setattr(gradient_variance, "CREDITS", [CREDITS[0], CREDITS[-1]])
    monkeypatch.setattr(gradient_variance, "POSITIONS", (0, 10))
    rows = list(measure(10, 500))
    assert [(row["rollouts"], row["credit"]) for row in rows] == [
        ("MixGRPO", "as published"),
        ("BranchGRPO", "as published"),
        ("BranchGRPO", "siblings, std: none, by leaves"),  # MixGRPO has no tree
    ]
    assert all(set(row) == set(COLUMNS) for row in rows)
    assert rows[1]["cost"] == rows[2]["cost"]
    assert rows[1]["cosine"] != rows[2]["cosine"]
    plot(rows, tmp_path / "plot.png")
    assert not pyplot.get_fignums()
    assert (tmp_path / "plot.png").stat().st_size > 0
