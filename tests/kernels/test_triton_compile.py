"""The Triton kernels as a GPU would get them, compiled without one:
wide accesses, exact arithmetic, sums in a written order, no spilled registers.
"""

import os
import re
from functools import cache

import pytest
import torch

from flowgrove_kernels import (
    NoiseKey,
    StepCoefficients,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
)
from kernel_cases import stochastic_rows
from op_calls import batch_of

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip(
        "triton.compile does not work beside the interpreter: run this file without TRITON_INTERPRET",
        allow_module_level=True,
    )
pytest.importorskip("triton", reason="Triton compiles the kernels: pip install triton")

from triton_compile import Compiled, Launch, launches, names

CAPABILITIES = (80, 90, 100)
REGISTERS = 128  # of a thread; two programs of eight warps then fit a multiprocessor
ACCESSES = 4  # of four neighbours, by each thread for each row of a program
B, D, FANOUT, E = 2, 2**16, 2, 4
X, X_NEXT, NOISE, SCORES = torch.zeros(B, D), torch.zeros(E, D), torch.zeros(E, D), torch.zeros(E)
HALF, FULL = torch.zeros(B, D, dtype=torch.bfloat16), torch.zeros(B, D)
KEY = NoiseKey(1, 2, 3, 4, torch.arange(E), torch.arange(E) // FANOUT)
MANY = torch.zeros(17, 1031), torch.zeros(17)
OFFSETS = torch.tensor([0, 1, E])
COEF = stochastic_rows(B)
GUARD = {"ratio": "guard", "key": KEY, "sibling_correlation": 0.1}


def step(v, **options):
    return lambda: flow_step(X, v, COEF, fanout=FANOUT, **options)


def logp_and_gradient(v, **options):
    u = options.get("v_uncond")
    wanted = [t.detach().requires_grad_() for t in (v, u) if t is not None]
    options |= {} if u is None else {"v_uncond": wanted[1]}
    return lambda: torch.autograd.grad(flow_logprob(X, wanted[0], X_NEXT, COEF, **options).sum(), wanted)


def loss(v, old_logp=SCORES, **options):
    return lambda: grpo_loss_and_grad(
        X, v, X_NEXT, COEF, old_logp, SCORES, SCORES, clip_range=0.1, **{"fanout": FANOUT} | options
    )


def many_edges():
    """More than one program of scores_kernel takes."""
    x, scores = MANY
    grpo_loss_and_grad(x[:1], x[:1], x, COEF[:1], scores, scores, scores, clip_range=0.1, fanout=17)


def guided(like):
    return {"v_uncond": like, "guidance_scale": 2.5}


def smallest():
    """One row of one element: every integer argument is the constant 1."""
    x, one, coef = X[:1, :1], torch.zeros(1), StepCoefficients(*(t[:1] for t in COEF.tensors()))
    flow_step(x, x, coef, key=NoiseKey(1, 2, 3, 4, 5))
    logp_and_gradient(x)
    grpo_loss_and_grad(x, x, x, coef, one, one, one, clip_range=0.1, v_ref=x, kl_weight=0.1)
    philox_normal((1, 1), NoiseKey(1, 2, 3, 4, 5))
    clean_estimate(x, x, 0.5)


# A call → the rows that its kernels read and write for each block: (fp32 read, bf16 read, fp32 written, bf16 written)
CALLS = {
    "normals": (lambda: philox_normal((E, D), KEY), {"normal_kernel": (0, 0, 1, 0)}),
    "estimate bf16": (lambda: clean_estimate(X, HALF, 0.5), {"estimate_kernel": (1, 1, 1, 0)}),
    "estimate fp32 guided": (lambda: clean_estimate(X, FULL, 0.5, **guided(FULL)), {"estimate_kernel": (3, 0, 1, 0)}),
    "step bf16": (step(HALF, key=KEY), {"step_kernel": (1, 1, 1, 0), "logp_kernel": None}),
    "step fp32": (step(FULL, key=KEY), {"step_kernel": (2, 0, 1, 0)}),
    "step bf16, all": (
        step(HALF, key=KEY, history=X, sibling_correlation=0.1, **guided(HALF)),
        {"step_kernel": (2, 2, 1, 0)},
    ),
    "step bf16, noise given": (step(HALF, noise=NOISE), {"step_kernel": (2, 1, 1, 0)}),
    "step bf16, mean": (step(HALF), {"step_kernel": (1, 1, 1, 0)}),
    "step, one block": (
        lambda: flow_step(X[:, :4096], HALF[:, :4096], COEF, key=KEY, fanout=FANOUT),
        {"step_kernel": (1, 1, 1, 0)},
    ),
    "logp bf16": (
        logp_and_gradient(HALF, fanout=FANOUT),
        {"logprob_kernel": (2, 1, 0, 0), "gradient_kernel": (2, 1, 0, 1)},
    ),
    "logp fp32": (
        logp_and_gradient(FULL, fanout=FANOUT),
        {"logprob_kernel": (3, 0, 0, 0), "gradient_kernel": (3, 0, 1, 0)},
    ),
    "logp bf16, all": (
        logp_and_gradient(HALF, child_offsets=OFFSETS, **guided(HALF)),
        {"logprob_kernel": (2, 2, 0, 0), "gradient_kernel": (2, 2, 0, 2)},
    ),
    "loss bf16": (loss(HALF), {"sums_kernel": (2, 1, 0, 0), "gradient_kernel": (2, 1, 0, 1), "scores_kernel": None}),
    "loss of many edges": (many_edges, {"scores_kernel": None, "loss_kernel": None}),
    "loss fp32": (loss(FULL), {"sums_kernel": (3, 0, 0, 0), "gradient_kernel": (3, 0, 1, 0)}),
    "loss bf16, kl": (
        loss(HALF, None, v_ref=HALF, kl_weight=0.1, **guided(HALF)),
        {"sums_kernel": (2, 3, 0, 0), "gradient_kernel": (2, 3, 0, 2), "scores_kernel": None},
    ),
    "loss bf16, guard": (
        loss(HALF, **GUARD),
        {"sums_kernel": (2, 1, 0, 0), "gradient_kernel": (0, 1, 0, 1), "scores_kernel": None},
    ),
    "loss bf16, guard, noise given": (
        loss(HALF, ratio="guard", noise=NOISE),
        {"sums_kernel": (3, 1, 0, 0), "gradient_kernel": (1, 1, 0, 1)},
    ),
    "loss bf16, all": (
        loss(HALF, child_offsets=OFFSETS, v_ref=HALF, kl_weight=0.1, fanout=1, **GUARD, **guided(HALF)),
        {"sums_kernel": (2, 3, 0, 0), "gradient_kernel": (0, 3, 0, 2), "scores_kernel": None},
    ),
    "one element": (smallest, {}),
}
EVERYWHERE = (
    "normals",
    "estimate fp32 guided",
    "step bf16",
    "step bf16, all",
    "logp bf16, all",
    "loss bf16",
    "loss of many edges",
    "loss bf16, all",
)


@cache
def launched(name: str) -> dict[str, Launch]:
    return launches(CALLS[name][0])


@cache
def compiled(name: str, kernel: str, capability: int) -> Compiled:
    return launched(name)[kernel].compiled(capability)


def cases(capabilities=CAPABILITIES, *, streaming=False):
    """(call, kernel, capability): all calls for 90, a sample that holds every kernel for the others. streaming: only
    kernels that go through rows.
    """
    chosen = [
        (name, capability) for capability in capabilities for name in CALLS if capability == 90 or name in EVERYWHERE
    ]
    found = [
        (name, kernel, capability)
        for name, capability in chosen
        for kernel, rows in CALLS[name][1].items()
        if rows or not streaming
    ]
    return [pytest.param(*case, id=f"sm_{case[2]} {case[1]} in {case[0]}") for case in found]


@pytest.mark.parametrize(("name", "kernel", "capability"), cases(streaming=True))
def test_rows_are_read_and_written_four_elements_at_a_time_and_stay_in_their_thread(name, kernel, capability):
    """128 bits of fp32 and 64 of bf16: eight bf16 would have to be exchanged between threads to meet eight fp32."""
    found, (full_in, half_in, full_out, half_out) = compiled(name, kernel, capability), CALLS[name][1][kernel]
    accesses = found.matching(r"(ld|st)\.global\.v\d.*")
    expected = {
        "ld.global.v4.b32": full_in,
        "ld.global.v2.b32": half_in,
        "st.global.v4.b32": full_out,
        "st.global.v2.b32": half_out,
    }
    assert accesses == {instruction: ACCESSES * rows for instruction, rows in expected.items() if rows}
    assert not found.matching(r"(ld|st)\.global\.b(8|16)")
    assert "ttg.convert_layout" not in found.ttgir


@pytest.mark.parametrize(("name", "kernel", "capability"), cases())
def test_arithmetic_is_rounded_as_written(name, kernel, capability):
    found = compiled(name, kernel, capability)
    assert not found.matching(r".*\.approx.*|.*\.full\..*")
    assert not found.matching(r"(add|sub|mul|mad)(\.ftz)?\.f(32|64)")  # without .rn ptxas may contract them
    assert launched(name)[kernel].options["enable_fp_fusion"] is False


@pytest.mark.parametrize(("name", "kernel", "capability"), cases())
def test_no_register_is_spilled(name, kernel, capability):
    """Without the limit Triton 3.6 takes 149 to 155 registers for step_kernel and sums_kernel:
    one program a multiprocessor.
    """
    resources = compiled(name, kernel, capability).resources
    assert launched(name)[kernel].options["maxnreg"] == REGISTERS
    assert resources["REG"] <= REGISTERS
    assert resources["STACK"] == resources["LOCAL"] == 0


@pytest.mark.parametrize(("name", "kernel", "capability"), cases((90,)))
def test_every_reduction_adds_two_numbers(name, kernel, capability):
    """A sum of more leaves its order to the layout, which differs between kernels; a sum of two has one value."""
    found = compiled(name, kernel, capability)
    reductions = re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d+) : i32.*?\}\) : \(tensor<([\dx]+)x[a-z]\w*>\)', found.ttir, re.S
    )
    assert len(reductions) == found.ttir.count('"tt.reduce"')
    assert bool(reductions) == (kernel not in ("normal_kernel", "estimate_kernel", "gradient_kernel"))
    assert {int(shape.split("x")[int(axis)]) for axis, shape in reductions} <= {2}


@pytest.mark.parametrize(("name", "kernel", "fused"), [
    ("estimate bf16", "estimate_kernel", 1),
    ("estimate fp32 guided", "estimate_kernel", 2),
    ("step bf16, mean", "step_kernel", 1),
    ("step bf16, noise given", "step_kernel", 2),
    ("logp bf16", "logprob_kernel", 1),
    ("logp bf16, all", "logprob_kernel", 2),
    ("loss bf16, kl", "sums_kernel", 2),
    ("logp bf16", "gradient_kernel", 2),
])  # fmt: skip
def test_only_the_written_products_are_fused(name, kernel, fused):
    assert compiled(name, kernel, 90).instructions["fma.rn.f32"] == 4 * ACCESSES * fused


@pytest.mark.parametrize(
    ("name", "kernel", "streams"),
    [("normals", "normal_kernel", 1), ("step bf16", "step_kernel", 1), ("step bf16, all", "step_kernel", 2)],
)
def test_each_philox_call_gives_four_normals(name, kernel, streams):
    """Ten rounds of two products with a high half for every four elements;
    in the first round one of them is the same for all.
    """
    products = compiled(name, kernel, 90).instructions["mul.hi.u32"]
    assert 0.8 * streams * ACCESSES * 20 <= products <= streams * ACCESSES * 20


# ---- launches ----


@pytest.mark.parametrize(("size", "blocks"), [(1032, 1), (4096, 1), (129_600, 32)])
def test_launches(size, blocks):
    """Rows of one block take a launch less; what only the device sees is checked by the kernels that read it."""
    batch = batch_of(4, size, fanout=2, dtype=torch.bfloat16)
    key, logp = batch.key.packed(8), [] if blocks == 1 else ["logp_kernel"]
    offsets = torch.tensor([0, 1, 3, 3, 8])
    guard = {"ratio": "guard", "key": key, "sibling_correlation": 0.1}
    everything = guard | {"v_ref": batch.v_ref, "kl_weight": 0.1, "child_offsets": offsets} | batch.guidance
    at, scores = (batch.x, batch.v, batch.coef), {"clip_range": 0.1}
    v = batch.v.detach().requires_grad_()

    assert names(lambda: philox_normal(batch.noise.shape, key)) == ["normal_kernel"]
    assert names(lambda: clean_estimate(batch.x, batch.v, batch.sigma, **batch.guidance)) == ["estimate_kernel"]
    for options in (
        {},
        {"noise": batch.noise},
        {"key": key},
        {"key": key, "sibling_correlation": 0.1, "history": batch.history, **batch.guidance},
    ):
        assert names(lambda options=options: flow_step(*at, fanout=2, **options)) == ["step_kernel", *logp]
    for options in ({"fanout": 2}, {"child_offsets": offsets}):
        assert names(lambda options=options: flow_logprob(*batch.steps, **options)) == ["logprob_kernel", *logp]
    for options in ({"fanout": 2}, {"child_offsets": offsets}, {"fanout": 2, **guard}, everything):
        forward = ["sums_kernel", "scores_kernel"]
        gradient = ["aten::ones", "sums_kernel", "scores_kernel", "gradient_kernel"]
        assert names(lambda options=options: grpo_loss(*batch.steps, *batch.scores, **scores, **options)) == forward
        assert (
            names(lambda options=options: grpo_loss_and_grad(*batch.steps, *batch.scores, **scores, **options))
            == gradient
        )
    score = torch.ones(8)
    logprob = names(lambda: torch.autograd.grad(flow_logprob(batch.x, v, *batch.steps[2:], fanout=2), v, score))
    assert logprob == ["logprob_kernel", *logp, "gradient_kernel"]
    loss = names(
        lambda: torch.autograd.grad(
            grpo_loss(batch.x, v, *batch.steps[2:], *batch.scores, **scores, fanout=2).loss, v, score[0]
        )
    )
    own = ["sums_kernel", "scores_kernel", "sums_kernel", "scores_kernel", "gradient_kernel"]
    assert loss == own


def test_more_edges_than_one_program_takes_need_a_launch_more():
    assert names(many_edges) == ["aten::ones", "sums_kernel", "scores_kernel", "loss_kernel", "gradient_kernel"]


def asserts(name, kernel):
    """How many checks of device values a kernel holds."""
    return compiled(name, kernel, 90).ptx.count("call.uni __assertfail")


def test_kernels_check_what_only_the_device_sees():
    """Six words of a key, and the step of correlated siblings; prev_coef where there is no history;
    offsets of children.
    """
    assert asserts("normals", "normal_kernel") == 6
    assert asserts("step bf16", "step_kernel") == 7
    assert asserts("step bf16, all", "step_kernel") == 7
    assert asserts("step bf16, mean", "step_kernel") == 1
    assert asserts("logp bf16, all", "logprob_kernel") == 2
    assert asserts("logp bf16, all", "gradient_kernel") == 1
    assert asserts("loss bf16, all", "sums_kernel") == 9
    # no arithmetic is checked
    assert asserts("logp bf16", "logprob_kernel") == asserts("loss bf16", "sums_kernel") == 1


def test_a_row_of_one_element_compiles():
    for launch in launched("one element").values():
        assert launch.compiled(90).resources["LOCAL"] == 0
