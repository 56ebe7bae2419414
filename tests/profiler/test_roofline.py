"""The roofline: where points lie under the roof, on made-up figures whose answers are known."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowgrove.bench.cases import CASES
from flowgrove.bench.table import read_columns, write_results
from flowgrove.setup import Setup
from policy_cases import policy_of, small_recipe
from subprocesses import ROOT

PLACE = {"device": "a card", "threads": 2, "torch": "2.13.0", "date": "2026-11-27"}


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    return importlib.import_module("roofline")


def op(case, contender, size, us, graph_us=None, dtype="bf16"):
    name, kind = case
    return {
        "op": name, "case": kind, "contender": contender, "dtype": dtype, "rows": 2, "elements": size // 20,
        "bytes": size, "median_us": us, "copy_gb_per_s": 100.0, "graph_us": graph_us,
        "graph_copy_gb_per_s": graph_us and 200.0, **PLACE,
    }  # fmt: skip


def test_an_ops_largest_shape_by_our_own_backend_is_a_point(roofline):
    step = ("flow_step", "noise drawn")
    rows = [
        op(step, "eager", 8000, 1.0),
        op(step, "cpu", 4000, 5.0),
        op(step, "cpu", 8000, 10.0),
        op(step, "cpu", 16000, 3.0, dtype="fp32"),
        op(("grpo_loss", "forward+backward"), "triton", 8000, 10.0, 8.0),
        op(("grpo_loss", "forward+backward"), "cuda", 8000, 10.0, 5.0),
    ]
    first, second = roofline.op_points(rows)
    assert (first["bytes"], first["seconds"], first["gflop"]) == (8000, pytest.approx(1e-5), pytest.approx(8 * 800e-9))
    assert second["seconds"] == pytest.approx(5e-6), "cuda, inside a graph"
    assert second["detail"] == "2x400 cuda"


def test_every_case_of_the_benchmark_has_its_flops(roofline):
    assert set(roofline._FLOPS) == {(case.op, case.name) for case in CASES}


def test_a_phase_moves_weights_once_a_pass_and_its_states(roofline):
    rows = [
        {"phase": "rollout/transformer", "tflop": 2.0, "passes": 3, "rows": 10, "seconds": 0.5},
        {"phase": "update/backward", "tflop": 3.0, "passes": 2, "rows": 10, "seconds": 0.5},
        {"phase": "update/transformer", "tflop": None, "passes": 0, "rows": 0, "seconds": 0.0},
        {"phase": "reward/decode", "tflop": 1.0, "passes": 1, "rows": 4, "seconds": 0.5},
    ]
    found = SimpleNamespace(rows=rows, recipe="mix on tiny", dtype="bf16")
    forward, backward = roofline.phase_points(found, weights=1000, trained=100, state=7)
    assert forward["bytes"] == 3 * 1000 + 10 * 7
    assert backward["bytes"] == 2 * (1000 + 100) + 10 * 7
    assert forward["gflop"] == 2000.0


def test_the_least_that_is_moved_is_the_models(roofline):
    recipe = small_recipe(model={"dtype": "fp32"})
    weights = list(policy_of("fp32").transformer.parameters())
    whole = 4 * sum(each.numel() for each in weights)
    assert roofline.minimum(Setup(recipe)) == (whole, whole, 4 * 8 * 8 * 8)


def test_shares_are_of_the_roof_above_a_point(roofline):
    """A copy of 100 GB/s and a product of 1 TFLOP/s meet at 10 FLOPs per byte."""
    left = roofline.against_roof({"gflop": 1.0, "bytes": 10**9, "seconds": 0.02}, 1e11, 1e12)
    assert (left["intensity"], left["bound_by"]) == (1.0, "copy")
    assert left["percent_of_roof"] == pytest.approx(50.0), "50 of 100 GB/s"
    right = roofline.against_roof({"gflop": 100.0, "bytes": 10**9, "seconds": 0.4}, 1e11, 1e12)
    assert (right["bound_by"], right["percent_of_roof"]) == ("matrix", pytest.approx(25.0))


def test_the_roofline_is_written_and_drawn(roofline, tmp_path):
    committed = Path(roofline.FIGURES) / "ops_cpu.csv"
    phases = [
        {"name": name, "kind": "phase", "detail": "mix on tiny", "dtype": "fp32", "gflop": 5.0, "bytes": 10**8,
         "seconds": 0.2, **PLACE}
        for name in ("rollout/transformer", "update/backward")
    ]  # fmt: skip
    rows = [roofline.against_roof(row, 1.6e10, 1e11) for row in phases + roofline.op_points(read_columns(committed))]
    assert len(rows) == 2 + len(CASES)
    told = write_results(rows, roofline.COLUMNS, roofline.plot_roofline, tmp_path / "roofline_cpu")
    assert told.endswith("roofline_cpu.csv and .png")
    assert [row["name"] for row in read_columns(tmp_path / "roofline_cpu.csv")] == [row["name"] for row in rows]
    assert all(0 < row["percent_of_roof"] < 200 for row in rows), "a copy on a CPU is no bound of what its caches hold"
    assert (tmp_path / "roofline_cpu.png").read_bytes()[:4] == b"\x89PNG"
