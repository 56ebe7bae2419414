"""The op benchmark (DESIGN §3.3): what it writes, that it compares like with like,
and that it refuses what is wrong.
"""

import csv
import os
import shutil

import pytest
import torch

from engine_cases import refuse, strict_json, succeed
from flowgrove import machine
from flowgrove.bench import counting, ops, published
from flowgrove.bench.cases import CASES, Contender
from flowgrove.bench.check import Deviation
from flowgrove.bench.counting import footprint
from flowgrove.bench.inputs import SHAPES, find_shape, make_inputs
from flowgrove.bench.ops import COLUMNS, bench_ops, settings_of
from flowgrove.bench.timing import copier, interleave, make_clock
from flowgrove.errors import UserError
from flowgrove_kernels import flow_logprob, flow_step, grpo_loss, step_coefficients, use_backend

CPU = torch.device("cpu")
POSITIVE = (
    "median_us",
    "q10_us",
    "q90_us",
    "rounds",
    "bytes",
    "gb_per_s",
    "copy_gb_per_s",
    "percent_of_copy",
    "launches",
    "peak_bytes",
    "output_bytes",
)
GROUP = ("op", "case", "shape", "dtype")
KINDS = {(case.op, case.name) for case in CASES}


def quiet(_):
    pass


def small(contenders="eager,reference", **changes):
    return settings_of(
        **{"shapes": "3x129", "dtypes": "fp32", "contenders": contenders, "rounds": 2, "device": "cpu", **changes}
    )


def published_case(dtype):
    """(x, v, sigma, sigma_next, rows) of 4 samples at different noise levels."""
    generator = torch.Generator().manual_seed(3)
    x, v = (torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.2], dtype=torch.float64)
    sigma_next = torch.tensor([0.8, 0.65, 0.4, 0.1], dtype=torch.float64)
    rows = step_coefficients("flow_sde", sigma, sigma_next, noise_level=published.NOISE_LEVEL, dtype=torch.float64)
    return x, v, sigma.to(dtype), sigma_next.to(dtype), rows


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(rows printed as JSON, folder of the files, stderr) of one small run of the command."""
    folder = tmp_path_factory.mktemp("bench") / "new"
    options = (
        "--shapes",
        "3x129",
        "--dtypes",
        "bf16,fp32",
        "--contenders",
        "eager,reference",
        "--rounds",
        2,
        "--device",
        "cpu",
    )
    result = succeed("bench", "ops", "--json", "--out", folder, *options)
    return strict_json(result.stdout), folder, result.stderr


# what a run writes


def test_there_is_a_row_for_every_case_shape_dtype_and_contender(measured):
    rows, _, _ = measured
    found = {(row["op"], row["case"], row["shape"], row["dtype"], row["contender"]) for row in rows}
    names = {
        kind: ["eager", "reference"] + (["reference autograd"] if kind[0] == "grpo_loss" else []) for kind in KINDS
    }
    assert found == {
        (*kind, "3x129", dtype, name) for kind in KINDS for dtype in ("bf16", "fp32") for name in names[kind]
    }
    assert len(rows) == len(found)


def test_the_csv_has_every_column_and_the_rows_of_the_json(measured):
    rows, folder, _ = measured
    with (folder / "ops_cpu.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    assert [{name: "" if row[name] is None else str(row[name]) for name in COLUMNS} for row in rows] == lines
    assert (folder / "ops_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_positive_and_quantiles_are_ordered(measured):
    for row in measured[0]:
        assert all(row[name] > 0 for name in POSITIVE)
        assert row["q10_us"] <= row["median_us"] <= row["q90_us"]
        assert row["peak_extra_bytes"] == row["peak_bytes"] - row["output_bytes"] >= 0
        assert row["speedup_vs_compiled"] is None  # it did not run


def test_figures_of_one_row_agree_with_each_other(measured):
    for row in measured[0]:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3, rel=2e-3)
        assert row["percent_of_copy"] == pytest.approx(100 * row["gb_per_s"] / row["copy_gb_per_s"], rel=2e-3)
        (eager,) = (
            other
            for other in measured[0]
            if other["contender"] == "eager" and all(other[name] == row[name] for name in GROUP)
        )
        assert row["speedup_vs_eager"] == pytest.approx(eager["median_us"] / row["median_us"], rel=2e-3)


def test_rows_say_where_they_were_measured(measured):
    for row in measured[0]:
        assert row["torch"] == torch.__version__
        assert row["threads"] == torch.get_num_threads()
        assert row["device"]
        assert row["launches_are"] == "op calls"


def test_without_eager_there_is_a_csv_and_no_plot(tmp_path):
    bench_ops(small(contenders="reference", only="flow_logprob"), quiet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ops_cpu.csv"]


def test_progress_goes_to_stderr(measured):
    assert "flow_step, noise drawn, 3x129, bf16: eager" in measured[2]


def test_without_json_there_are_tables_that_fit_80_columns():
    result = succeed(
        "bench",
        "ops",
        "--shapes",
        "2x64",
        "--dtypes",
        "fp32",
        "--contenders",
        "eager,reference",
        "--only",
        "grpo_loss",
        "--rounds",
        1,
    )
    assert "reference autograd" in result.stdout
    assert "…" not in result.stdout


@pytest.mark.parametrize(("kind", "dtype", "per_element"), [
    (("flow_step", "noise drawn"), "fp32", 12), (("flow_step", "noise drawn"), "bf16", 10),
    (("flow_step", "noise given"), "fp32", 16), (("flow_logprob", "forward"), "bf16", 10),
    (("flow_logprob", "forward+backward"), "fp32", 16), (("grpo_loss", "forward+backward"), "bf16", 12),
])  # fmt: skip
def test_the_bytes_are_those_of_every_tensor_once(kind, dtype, per_element):
    """x, v and, as the case has them, x' or z and a gradient; the numbers per row are few."""
    (case,) = (case for case in CASES if (case.op, case.name) == kind)
    inputs = make_inputs(find_shape("2x1024"), dtype, CPU)
    assert 0 < case.traffic(inputs) - 2048 * per_element <= 2 * 4 * 10


# what a call launches and allocates


def test_launches_are_the_ops_that_do_work():
    x = torch.ones(8)
    counted = footprint(
        Contender("c", lambda: (torch.add(x.view(2, 4), 1).mul(x.view(2, 4)).to(torch.float32).mean(),)), CPU
    )
    assert counted.launches == 3  # add, mul, mean; views and a conversion to the same dtype are none


def test_peak_memory_is_that_of_the_moment_not_the_sum():
    x = torch.ones(1000)

    def run():
        total = x + 1  # 4000 bytes, the output
        for _ in range(3):
            total.add_(x * x)  # 4000 more, freed before the next
        return (total,)

    counted = footprint(Contender("c", run), CPU)
    assert (counted.peak_bytes, counted.output_bytes) == (8000, 4000)


def test_eager_needs_memory_beyond_its_outputs(measured):
    eager = [row for row in measured[0] if row["contender"] == "eager"]
    assert all(row["peak_extra_bytes"] >= 4 * row["rows"] * row["elements"] for row in eager)


def test_the_profiler_is_told_to_be_quiet():
    """It prints two lines of its own for every call."""
    assert counting.profile is torch.profiler.profile
    assert int(os.environ["KINETO_LOG_LEVEL"]) > 6


@pytest.mark.long
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
def test_compiled_kernels_are_counted_and_others_are_compared_with_them(fresh_dynamo):
    rows = bench_ops(small(contenders="eager,compiled"), quiet).rows
    assert len(rows) == 2 * len(CASES)
    launches = {(row["op"], row["case"]): row["launches"] for row in rows if row["contender"] == "compiled"}
    assert all(1 <= count <= 4 for count in launches.values())
    for row in rows:
        assert (row["speedup_vs_compiled"] == 1) or row["contender"] == "eager"


# timing


def test_every_round_runs_every_contender_once_in_an_order_of_its_own():
    calls = []
    entrants = [Contender(name, lambda name=name: (calls.append(name), torch.ones(()))[1:]) for name in "abcd"]
    interleave(entrants, make_clock(CPU), 10)
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(rounds) == 12  # two to warm up
    assert len(set(rounds)) > 4


def test_a_clock_that_is_known_gives_its_quantiles():
    ticks = iter([100.0, 100.0, *range(1, 12)])
    (spread,) = interleave([Contender("a", lambda: ())], lambda _: next(ticks), 11).values()
    assert spread == (6, 2, 10)


def test_the_copy_moves_as_many_bytes_as_the_case():
    (target,) = copier(8000, CPU).run()
    assert 2 * target.untyped_storage().nbytes() == 8000


# what is compared


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_published_formulas_and_our_ops_agree(dtype, tolerance):
    x, v, sigma, sigma_next, rows = published_case(dtype)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=dtype)
    old = torch.zeros(4, dtype=dtype)
    advantage, weight = torch.tensor([1.0, -1.0, 0.5, -2.0], dtype=dtype), torch.full((4,), 0.25, dtype=dtype)
    x_next, logp = published.sde_step(x, v, sigma, sigma_next, noise)
    ours, our_logp = flow_step(x, v, rows, noise=noise)
    torch.testing.assert_close((x_next, logp), (ours, our_logp), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        published.log_prob(x, v, x_next, sigma, sigma_next), flow_logprob(x, v, x_next, rows), rtol=0, atol=tolerance
    )
    old = logp + torch.tensor([0.05, -0.5, 0.5, -0.05], dtype=dtype)  # ratios on both sides of the clip range
    left, right = v.clone().requires_grad_(), v.clone().requires_grad_()
    loss = published.clipped_loss(x, left, x_next, sigma, sigma_next, old, advantage)
    our_loss = grpo_loss(x, right, x_next, rows, old, advantage, weight, clip_range=published.CLIP_RANGE).loss
    (gradient,), (our_gradient,) = torch.autograd.grad(loss, left), torch.autograd.grad(our_loss, right)
    torch.testing.assert_close((loss, gradient), (our_loss, our_gradient), rtol=0, atol=tolerance)
    assert (gradient.flatten(1).norm(dim=1) == 0).tolist() == [False, False, False, False]


def test_the_published_step_draws_noise_of_its_own():
    x, v, sigma, sigma_next, _ = published_case(torch.float32)
    first, second = (published.sde_step(x, v, sigma, sigma_next)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_no_row_of_the_benchmark_is_clipped():
    """A clipped row has no gradient, and an implementation might skip it."""
    inputs = make_inputs(find_shape("16x64"), "bf16", CPU)
    with use_backend("reference"):
        result = grpo_loss(
            inputs.x,
            inputs.v,
            inputs.x_next,
            inputs.coef,
            inputs.old_logp,
            inputs.advantage,
            inputs.weight,
            clip_range=published.CLIP_RANGE,
        )
    assert result.clipped.tolist() == [0] * 16
    assert result.ratio.log().abs().tolist() == pytest.approx([0.05] * 16, abs=1e-5)


def test_the_shapes_are_those_of_the_models():
    assert {name: (shape.rows, shape.elements) for name, shape in SHAPES.items()} == {
        "flux_720": (16, 129_600),
        "sd35_512": (16, 65_536),
        "wan_480p81": (1, 2_096_640),
        "wide": (512, 131_072),
        "row_64m": (1, 67_108_864),
    }


# what is refused


def altered(name, change):
    """The published function with its result changed."""
    original = getattr(published, name)
    return lambda *arguments: change(original(*arguments))


@pytest.mark.parametrize(("name", "change", "output"), [
    ("sde_step", lambda out: (out[0] + 1e-5 * out[0].abs(), out[1]), "x_next"),
    ("sde_step", lambda out: (out[0], out[1] + 2e-5), "logp"),
    ("sde_step", lambda out: (out[0], out[1] * float("nan")), "logp"),
    ("log_prob", lambda out: out + 2e-5, "logp"),
    ("log_prob", lambda out: 1.001 * out - 0.001 * out.detach(), "gradient"),
    ("clipped_loss", lambda out: out + 2e-5, "loss"),
    ("clipped_loss", lambda out: 1.001 * out - 0.001 * out.detach(), "gradient"),
])  # fmt: skip
def test_a_contender_that_is_wrong_gets_no_row(monkeypatch, name, change, output):
    monkeypatch.setattr(published, name, altered(name, change))
    op = {"sde_step": "flow_step", "log_prob": "flow_logprob", "clipped_loss": "grpo_loss"}[name]
    result = bench_ops(small(only=op), quiet)
    assert any(line.startswith("eager is left out of") and f"{output} is off by" in line for line in result.wrong)
    assert {row["contender"] for row in result.rows} >= {"reference"}
    refused = {line.split(" is left out of ")[1].split(":")[0] for line in result.wrong}
    timed = {
        f"{row['op']}, {row['case']}, {row['shape']}, {row['dtype']}"
        for row in result.rows
        if row["contender"] == "eager"
    }
    assert not refused & timed


def test_noise_of_another_variance_is_wrong(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda like: 2 * torch.randn(like.shape))
    result = bench_ops(small(contenders="eager", only="flow_step"), quiet)
    assert [("noise drawn" in line, "variance of the noise" in line) for line in result.wrong] == [(True, True)]


def test_a_wrong_backend_is_refused_even_where_its_noise_looks_normal(monkeypatch):
    def other_noise(x, v, coef, *, key=None, noise=None):
        return flow_step(
            x,
            v,
            coef,
            noise=torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) if noise is None else noise,
        )

    monkeypatch.setattr("flowgrove.bench.cases.flow_step", other_noise)
    result = bench_ops(small(contenders="reference", only="flow_step"), quiet)
    assert [row["case"] for row in result.rows] == ["noise given"]
    assert len(result.wrong) == 1


def test_a_wrong_contender_is_exit_code_1_and_the_others_are_still_shown(monkeypatch):
    from engine_cases import flowgrove

    monkeypatch.setattr(published, "log_prob", altered("log_prob", lambda out: out + 1))
    options = (
        "--json",
        "--shapes",
        "2x64",
        "--dtypes",
        "fp32",
        "--contenders",
        "eager,reference",
        "--only",
        "flow_logprob",
        "--rounds",
        1,
    )
    result = flowgrove("bench", "ops", *options)
    assert result.exit_code == 1
    assert {row["contender"] for row in strict_json(result.stdout)} == {"reference"}
    assert (
        "eager is left out of flow_logprob, forward, 2x64, fp32: it is wrong: logp is off by 1, tolerance"
        in result.stderr
    )


def test_nan_is_wrong():
    assert Deviation("loss", float("nan"), 1.0).wrong


def test_what_does_not_fit_into_the_gpu_is_left_out_and_is_not_wrong(monkeypatch):
    def full(out):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(published, "log_prob", altered("log_prob", full))
    said = []
    result = bench_ops(small(only="flow_logprob"), said.append)
    assert {row["contender"] for row in result.rows} == {"reference"}
    assert result.wrong == []
    assert any("eager is left out" in line and "memory" in line for line in said)


# mistakes of a user


@pytest.mark.parametrize(("option", "value", "hint"), [
    ("--shapes", "flux_72", "flux_720"), ("--shapes", "0x5", "ROWSxELEMENTS"), ("--dtypes", "fp8", "bf16, fp32"),
    ("--contenders", "cuba", "eager"), ("--contenders", ",", "eager"), ("--only", "flow_walk", "flow_step"),
    ("--rounds", "0", ">= 1"), ("--device", "tpu", "auto, cpu or cuda"),
])  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_write(option, value, hint):
    line = refuse("bench", "ops", "--device", "cpu", option, value)
    assert option in line
    assert hint in line


def test_a_shape_that_is_too_large_is_said_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**30)
    line = refuse("bench", "ops", "--device", "cpu", "--shapes", "row_64m")
    assert "row_64m" in line
    assert "1.0 GiB are free" in line


def test_a_cpu_measures_the_two_largest_shapes_only_if_asked(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 2**50)
    assert [shape.name for shape in settings_of(device="cpu").shapes] == ["flux_720", "sd35_512", "wan_480p81"]
    assert [shape.name for shape in settings_of(device="cpu", shapes="wide,row_64m").shapes] == ["wide", "row_64m"]


def test_interpreted_triton_is_no_contender(monkeypatch):
    monkeypatch.setattr(ops, "available_backends", lambda: ("reference", "triton", "cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.available_contenders(CPU) == ("eager", "compiled", "reference")


def test_a_name_that_is_not_there_is_a_user_error():
    with pytest.raises(UserError, match="--contenders"):
        settings_of(contenders="nobody", device="cpu")
