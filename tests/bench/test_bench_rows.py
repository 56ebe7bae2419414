"""flowgrove bench rows: what a row costs, and FLUX.1-dev as a slim one's blocks make it."""

import json
from contextlib import nullcontext

import numpy as np
import pytest

from bench_models import small_qwen
from engine_cases import refuse, succeed
from flowgrove.bench import row_times
from flowgrove.bench.models import write_flux
from flowgrove.bench.recipes import bench_recipe
from flowgrove.models.families.qwen_image import QwenImage
from flowgrove.models.policy import Policy
from policy_cases import CPU, runner_of


def test_times_are_of_every_size_and_agree_with_their_rate():
    told = succeed("bench", "rows", "--model", "tiny", "--rows", "1,3", "--repeats", "1", "--device", "cpu", "--json")
    rows = json.loads(told.stdout)
    assert [(row["rows"], row["mode"], row["derived"]) for row in rows] == [(1, "eager", False), (3, "eager", False)]
    for row in rows:
        assert 0 < row["forward_ms"] < row["train_ms"]
        assert row["forward_tflop_per_s"] == pytest.approx(1e3 * row["forward_tflop"] / row["forward_ms"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rows", "0"), "--rows is '0'"),
        (("--modes", "fast"), "--modes names fast"),
        (("--modes", "recorded"), "measure on a GPU"),
        (("--modes", "attention"), "--modes names attention, and no kernel but sdpa's runs here: write eager"),
        (("--modes", "fp8"), "--modes names fp8: cpu devices like this one have no float8"),
        (("--model", "x"), "--model is x"),
    ],
)
def test_a_mistake_is_one_line(arguments, text):
    assert text in refuse("bench", "rows", "--device", "cpu", *arguments)


def test_passes_in_8_bits_are_timed_without_a_backward():
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    told = succeed(
        "bench", "rows", "--model", "tiny", "--rows", "2", "--repeats", "1", "--device", "cpu", "--json", "--modes",
        "int8,eager",
    )  # fmt: skip
    eager, int8 = json.loads(told.stdout)
    assert (eager["mode"], int8["mode"]) == ("eager", "int8")
    assert eager["train_ms"] is not None
    assert int8["train_ms"] is None
    assert int8["forward_tflop"] == eager["forward_tflop"]
    assert int8["forward_ms"] > 0


def test_kernels_of_attention_are_timed_or_left_out_with_a_reason(tmp_path):
    told = succeed("bench", "rows", "--rows", "1", "--repeats", "1", "--device", "cpu", "--modes", "eager,_native_math")
    assert "_native_math is left out: --modes names _native_math: diffusers' sd3 transformer" in told.output
    assert "write auto" not in told.output
    assert row_times.settings_of("tiny", "1", "eager,attention", 1, "cpu").modes == ("eager",)
    assert "--modes names cudnn: it needs a GPU" in refuse("bench", "rows", "--device", "cpu", "--modes", "cudnn")


def test_a_kernel_without_a_backward_is_timed_without_one(flux):
    flux.weights.cheapen(None, attention="_native_math")
    forward, train = (
        row_times._Timer(flux.cheap(), runner_of(flux), 1, 1.0, trains=trains) for trains in (False, True)
    )
    (line, *_), (other, *_) = (timer.lines("_native_math", 1) for timer in (forward, train))
    assert line["forward_ms"] > 0
    assert line["train_ms"] is None
    assert other["train_ms"] > 0


def test_blocks_are_taken_out_of_the_transformer_that_is_timed(flux):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    flux.weights.cheapen("int8")
    cheap = flux.cheap()
    timer = row_times._Timer(cheap, runner_of(flux), 1, 1.0)
    with row_times._cut(timer.lists[0], 1):
        assert len(cheap.adapter.transformer.transformer_blocks) == 1
        assert len(flux.transformer.transformer_blocks) == 3
    assert timer.sizes == [3, 2]


@pytest.fixture
def flux(tmp_path):
    changes = {
        "num_layers": 3,
        "num_single_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "joint_attention_dim": 64,
    }
    write_flux(tmp_path / "pipeline", changes, CPU)
    model = {
        "adapter": "flux",
        "path": str(tmp_path / "pipeline"),
        "dtype": "bf16",
        "height": 32,
        "width": 32,
        "lora": {"rank": 2, "alpha": 4},
    }
    return Policy.load(bench_recipe(model, 1, {"group_size": 16}, {"device": "cpu"}), CPU)


def test_the_whole_flux_is_what_its_blocks_cost(flux, monkeypatch):
    """A clock that knows: 5 ms around the blocks, 2 for each double one and 0.5 for each single one,
    three times that with backward.
    """
    timer = row_times._Timer(flux, runner_of(flux), 1)

    def known(mode, rows):
        double, single = (len(blocks) for blocks in timer.lists)
        return np.array([1.0, 3.0]) * (5 + 2 * double + 0.5 * single)

    monkeypatch.setattr(timer, "_milliseconds", known)
    measured, derived = timer.lines("eager", 4)
    assert (measured["blocks"], measured["forward_ms"], measured["derived"]) == ("3+2", 12.0, False)
    assert (derived["blocks"], derived["derived"], derived["forward_tflop_per_s"]) == ("19+38", True, None)
    assert derived["forward_ms"] == pytest.approx(5 + 2 * 19 + 0.5 * 38)
    assert derived["train_ms"] == pytest.approx(3 * derived["forward_ms"])


def test_nothing_is_derived_from_passes_that_wait_for_the_host(flux, monkeypatch):
    """By hand: without its blocks a pass takes no less."""
    timer = row_times._Timer(flux, runner_of(flux), 1)
    monkeypatch.setattr(timer, "_milliseconds", lambda mode, rows: np.array([20.0, 60.0]))
    assert [line["blocks"] for line in timer.lines("eager", 1)] == ["3+2"]
    assert timer.sizes == [len(blocks) for blocks in timer.lists], "the blocks that were taken out are back"


def test_fewer_blocks_are_what_is_timed(flux):
    timer = row_times._Timer(flux, runner_of(flux), 1)
    with row_times._cut(timer.lists[0], 1):
        assert len(flux.transformer.transformer_blocks) == 1
        timer.passes.forward(timer.passes.states(1))
    assert len(flux.transformer.transformer_blocks) == 3


def test_a_row_that_does_not_fit_says_so(flux, monkeypatch):
    timer = row_times._Timer(flux, runner_of(flux), 1)

    def full(rows, repeats):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(timer.passes, "timed", full)
    (line,) = timer.lines("eager", 64)
    assert line["forward_ms"] is line["train_ms"] is None
    assert row_times._told(line) == "no room"


@pytest.fixture
def qwen(tmp_path, monkeypatch):
    model = small_qwen(tmp_path / "pipeline", text_tokens=16)
    monkeypatch.setattr(row_times, "bench_model", lambda *_: nullcontext(model))


def test_texts_are_timed_with_and_without_their_mask_and_no_encoder_is_loaded(qwen, monkeypatch):
    masked, inner = [], QwenImage.velocity

    def velocity(self, x, sigma, cond, scale):
        masked.append("encoder_hidden_states_mask" in cond.tensors)
        return inner(self, x, sigma, cond, scale)

    monkeypatch.setattr(QwenImage, "velocity", velocity)
    told = succeed("bench", "rows", "--rows", "2", "--repeats", "1", "--device", "cpu", "--json", "--modes", "eager")
    eager, whole = json.loads(told.stdout)
    assert masked
    assert all(masked)
    assert (eager["blocks"], whole["blocks"], whole["derived"]) == ("2", "60", True)
    masked.clear()
    told = succeed("bench", "rows", "--rows", "2", "--repeats", "1", "--device", "cpu", "--json", "--modes", "split")
    split, *_ = json.loads(told.stdout)
    assert masked
    assert not any(masked[1:]), "but for the row whose FLOPs are counted"
    assert (split["mode"], split["forward_tflop"]) == ("split", eager["forward_tflop"])


def test_models_without_a_mask_have_none_to_leave_out():
    told = succeed("bench", "rows", "--rows", "1", "--repeats", "1", "--device", "cpu", "--modes", "split")
    assert "split is left out: sd3 has no mask to leave out" in told.output


def test_billions_of_weights_want_a_gpu():
    assert "which wants a GPU" in refuse("bench", "rows", "--model", "qwen_slim", "--device", "cpu")
