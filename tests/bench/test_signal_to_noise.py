"""The study of signal and noise at the untrained model: what it finds is that of all repeats' gradients together."""

import csv

import numpy as np
import pytest
import torch

import signal_to_noise
from engine_cases import tiny_recipe
from flowgrove.recipe.loading import load_recipe
from flowgrove.update.gradient_noise import group_gradients
from flowgrove.update.noise_estimates import estimate, student

WINDOW = {"steps": 4, "group_size": 4, "window": {"strategy": "random", "size": 2, "every": 1}}
REPEATS = 3


def test_repeats_are_pooled_as_prompts_of_one_iteration(tmp_path, monkeypatch):
    path = tiny_recipe(tmp_path, rollout=WINDOW)
    seen = []

    def spied(updater, plan, *rest):
        weights = [p.detach().clone() for p in updater.parameters]
        sums, passes = group_gradients(updater, plan, *rest)
        seen.append(([step.index for step in plan.trained_steps], sums.sum(2).double().numpy(), weights))
        return sums, passes

    monkeypatch.setattr(signal_to_noise, "group_gradients", spied)
    out = tmp_path / "found.csv"
    arguments = ["signal_to_noise.py", str(path), "--repeats", str(REPEATS), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*arguments, "--set", "update.kl_weight=0.1"])
    signal_to_noise.main()
    with out.open(encoding="utf-8") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert out.with_suffix(".png").stat().st_size > 1000

    assert len(seen) == REPEATS
    assert all(torch.equal(a, b) for a, b in zip(seen[0][2], seen[-1][2], strict=True)), "the policy stands still"
    windows = [steps for steps, *_ in seen]
    assert windows[0] != windows[-1] or windows[0] != windows[1], "seeds draw other windows"
    steps = sorted({step for some in windows for step in some})
    assert list(rows) == ["all", *map(str, steps)]
    buckets = seen[0][1].shape[-1]
    for key in rows:
        parts = [
            sums.sum(0) if key == "all" else sums[some.index(int(key))] if int(key) in some else np.zeros((2, buckets))
            for some, sums, _ in seen
        ]
        one = estimate(np.concatenate(parts), np.ones(2 * REPEATS))
        assert float(rows[key]["snr"]) == pytest.approx(2 * one.signal / one.noise, abs=1e-4)
        assert float(rows[key]["interval"]) == pytest.approx(student(5) * one.snr_error / 3, abs=1e-4)
    assert sum(float(rows[str(step)]["noise_share"]) for step in steps) == pytest.approx(1, abs=1e-3)
    recipe = load_recipe(path)
    assert float(rows["all"]["weighted_passes"]) > 2 * recipe.rollout.group_size
