"""A whole run with rollout.precision: its ratios are those of full precision, and evaluations tell what it changes."""

import pytest

from engine_cases import metrics_of, succeed, tiny_recipe
from torchrun import torchrun

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def lines(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    recipe = tiny_recipe(
        folder,
        model={"dtype": request.param},
        rollout={"precision": "int8", "steps": 5, "tail": {"compress": 0.5}},
        update={"updates_per_iteration": 1},
    )
    succeed("train", recipe, "--out", folder / "run")
    return metrics_of(folder / "run")


def test_the_first_update_has_the_rollouts_policy(lines):
    for line in lines:
        assert line["ratio_min"] == line["ratio_max"] == 1
        assert line["logp_drift"] <= 5e-7  # trained states were rolled out in full precision


def test_evaluations_tell_the_distance_to_full_precision(lines):
    told = [line["iteration"] for line in lines if "rollout_distance" in line]
    assert told == [line["iteration"] for line in lines if "eval_reward" in line] == [0, 2]
    assert all(0 < line["rollout_distance"] < 0.2 for line in lines if "rollout_distance" in line)


def test_evaluation_and_samples_need_no_torchao(tmp_path, monkeypatch):
    """They are in full precision."""
    import sys

    from flowgrove.models import quantised

    recipe = tiny_recipe(tmp_path, rollout={"precision": "int8"})
    quantised._rounding.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    succeed("sample", recipe, "--prompts", tmp_path / "eval.txt", "--out", tmp_path / "samples")
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


@pytest.mark.long
def test_ranks_measure_the_distance_together(tmp_path):
    """Of prompts that they divide. Sums in another order make other activations round up."""
    recipe = tiny_recipe(
        tmp_path, rollout={"precision": "int8"}, update={"updates_per_iteration": 1}, run={"iterations": 1}
    )
    succeed("train", recipe, "--out", tmp_path / "one")
    two = ("train", recipe, "--set", "engine.distributed=ddp", "--out", tmp_path / "two")
    torchrun(2, "-m", "flowgrove", *two, output=tmp_path / "log")
    (alone,), (together,) = (metrics_of(tmp_path / run) for run in ("one", "two"))
    assert together["rollout_distance"] == pytest.approx(alone["rollout_distance"], rel=0.3)
    assert (together["ratio_min"], together["ratio_max"]) == (1, 1)
