"""A run folder that an earlier version wrote goes on: tests/fixtures/old_run comes from the last commit before the
engine was divided into rooms (d73c033, torch 2.13 on an x86-64 CPU with AVX-512).
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine_cases import metrics_of, succeed

OLD = Path(__file__).parents[1] / "fixtures" / "old_run"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_it_resumes_where_it_stopped(folder):
    """Two iterations later rewards, ratios, weights, moments and averages are what the old version came to: to the last
    bit on such a CPU, elsewhere within rounding.
    """
    before = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    succeed("train", folder / "old.yaml", "--out", folder / "run")
    assert (folder / "run" / "metrics.jsonl").read_text().splitlines()[:2] == before
    lines = metrics_of(folder / "run")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    for line, expected in zip(
        lines[2:], map(json.loads, (folder / "expected.jsonl").read_text().splitlines()), strict=True
    ):
        assert line["reward"]["shapes"]["mean"] == pytest.approx(expected["reward"]["shapes"]["mean"], rel=1e-3)
        assert line["ratio_mean"] == pytest.approx(expected["ratio_mean"], abs=1e-5)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert (line["rollout_forwards"], line["train_passes"]) == (
            expected["rollout_forwards"],
            expected["train_passes"],
        )
        assert [key for key in line if key in expected] == list(expected)  # newer ones have come between
    for name in ("weights", "ema"):
        found = load_file(folder / "run" / "checkpoints" / "step_000004" / f"{name}.safetensors")
        wanted, start = (
            load_file(path)
            for path in (
                folder / f"expected_{name}.safetensors",
                OLD / "run" / "checkpoints" / "step_000002" / f"{name}.safetensors",
            )
        )
        assert list(found) == list(wanted)
        moved = sum(float((wanted[key] - start[key]).square().sum()) for key in wanted)
        off = sum(float((wanted[key] - found[key]).square().sum()) for key in wanted)
        assert moved > 0
        assert off < 1e-6 * moved, name


def test_its_recipe_has_the_fingerprint_of_then(folder):
    """Else a run would be taken for another one, and refused."""
    (line,) = [json.loads(path.read_text())["recipe"] for path in (folder / "run" / "checkpoints").glob("*/state.json")]
    succeed("train", folder / "old.yaml", "--out", folder / "run")
    states = sorted((folder / "run" / "checkpoints").glob("*/state.json"))
    assert [json.loads(path.read_text())["recipe"] for path in states] == [line, line]
    assert [json.loads(path.read_text())["completed_iterations"] for path in states] == [2, 4]
