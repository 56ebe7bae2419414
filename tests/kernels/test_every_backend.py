"""Every fused backend against the reference in float64: its error is at most twice that of the reference in fp32, for
every op, mode, dtype and size.
"""

import math
import os
from dataclasses import fields, replace
from functools import cache

import numpy
import pytest
import torch

from flowgrove_kernels import (
    INITIAL_STEP,
    NoiseKey,
    available_backends,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
    use_backend,
)
from flowgrove_kernels.backends import takes
from kernel_backends import EMULATED, NEEDS_A_COMPILER
from kernel_cases import (
    CLIP_HIGH,
    CLIP_LOW,
    LOSS_MODES,
    loss_arguments,
    naive_loss,
    normal_reference,
    randn,
    rollout,
    row,
    stochastic_rows,
)
from op_calls import moved

FUSED = [  # (backend, device of the tensors)
    pytest.param((name, device), id=f"{name} on {device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    for name in available_backends()
    if name != "reference" and takes(name, device)
]
# The last test is a sample of these.
FUSED.append(pytest.param((EMULATED, "cpu"), id=EMULATED, marks=[NEEDS_A_COMPILER, pytest.mark.long]))
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES = [(size, dtype) for size in (1, 3, 63, 129, 1031) for dtype in (F32, BF16, F16)]
CASES += [(1024, F32), (1024, BF16), (16_384, F32), (16_384, F16), (40_007, F32), (40_007, BF16), (40_007, F16)]
SIZES_AND_DTYPES = [
    pytest.param(size, dtype, id=f"{size}-{str(dtype).removeprefix('torch.')}") for size, dtype in CASES
]
RHO = 1 / 17


@pytest.fixture(params=FUSED, autouse=True)
def device(request):
    """The test runs once on every fused backend, on tensors of a device that it takes."""
    name, device = request.param
    if name == EMULATED:
        request.getfixturevalue("emulated_kernels")
    with use_backend("cpu" if name == EMULATED else name):
        yield device


@pytest.fixture(autouse=True)
def outputs_start_as_nan():
    """What torch.empty returns is NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def double(value):
    return moved(value, dtype=torch.float64)


def single(value):
    """For the reference in fp32: half precision velocities and their gradients are not rounded again."""
    return moved(value, dtype=F32)


def assert_as_exact_as_the_reference(ours, eager, exact, eager_exact=None) -> None:
    """max|ours − exact| ≤ 2·max|eager − exact| + 1e-6·max|exact|, and one rounding where ours is half precision;
    row by row where rows are long.
    """
    ours = ours.cpu()
    assert ours.shape == exact.shape
    rows = exact.ndim > 1 and exact.shape[1] >= 63

    def largest(values):
        return values.abs().amax(1, keepdim=True) if rows else values.abs().max()

    allowed = 2 * largest(eager - (exact if eager_exact is None else eager_exact)) + 1e-6 * largest(exact)
    if ours.dtype != F32:
        info = torch.finfo(ours.dtype)
        allowed = allowed + info.eps / 2 * exact.abs().clamp(min=info.tiny)
    error = (ours.double() - exact).abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"error {error.flatten()[worst].item():.3g}, allowed {allowed.expand_as(error).flatten()[worst].item():.3g}"
    )


STEPS = {
    "mean": {},
    "noise given": {"noise": True},
    "noise drawn": {"key": True},
    "history": {"noise": True, "history": True},
    "guidance": {"noise": True, "guided": True},
    "fanout 3": {"key": True, "fanout": 3},
    "siblings": {"key": True, "fanout": 3, "rho": RHO},
    "everything": {"key": True, "fanout": 3, "rho": RHO, "history": True, "guided": True},
}


@cache
def step_case(mode: str, size: int, dtype: torch.dtype):
    """(arguments of flow_step, the same for float64: with the exact noise that the key names)."""
    wanted = {"noise": False, "key": False, "history": False, "guided": False, "fanout": 1, "rho": 0.0} | STEPS[mode]
    batch, fanout = 5 if size < 10_000 else 2, wanted["fanout"]
    x, v, u, p = (randn(batch, size, seed=i).to(dtype if i in (1, 2) else F32) for i in range(4))
    coef, edges = stochastic_rows(batch), batch * fanout
    ours = {"x": x, "v": v, "coef": coef, "fanout": fanout}
    if wanted["history"]:
        coef.prev_coef.copy_(torch.linspace(-1, 1, batch))
        ours["history"] = p
    if wanted["guided"]:
        ours |= {"v_uncond": u, "guidance_scale": 3.7}
    exact = dict(ours)
    if wanted["noise"]:
        ours["noise"] = exact["noise"] = randn(edges, size, seed=5)
    if wanted["key"]:
        ours |= {
            "key": NoiseKey(2**32 - 1, 2, 3, 4, torch.arange(edges), torch.arange(edges) // fanout),
            "sibling_correlation": wanted["rho"],
        }
        own = normal_reference([(2**32 - 1, 2, 3, 4, e) for e in range(edges)], size)
        shared = normal_reference([(2**32 - 1, 2, 3 + 2**31, 4, e // fanout) for e in range(edges)], size)
        exact["noise"] = torch.from_numpy(math.sqrt(1 - wanted["rho"]) * own + math.sqrt(wanted["rho"]) * shared)
    return ours, double(exact)


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_DTYPES)
def test_flow_step(size, dtype, mode, device):
    arguments, exact = step_case(mode, size, dtype)
    x_next, logp = flow_step(**moved(arguments, device))
    with use_backend("reference"):
        eager, eager_logp = flow_step(**single(arguments))
        truth, _ = flow_step(**exact)
        mean, _ = flow_step(**exact | {"noise": None})
    assert x_next.dtype == logp.dtype == F32
    assert_as_exact_as_the_reference(x_next, eager, truth)
    coef = arguments["coef"][torch.arange(len(mean)) // arguments["fanout"]]

    def density(state):
        return coef.log_norm.double() - coef.precision.double() * (state.cpu().double() - mean).square().mean(1)

    assert_as_exact_as_the_reference(logp, eager_logp, density(x_next), density(eager))


@cache
def tree(children: tuple[int, ...], size: int, dtype: torch.dtype):
    with use_backend("reference"):
        return rollout(list(children), (size,), dtype=F32, v_dtype=dtype)


def trees(size):
    """Enough children for every kind of parent; large samples get fewer."""
    return ((3, 3, 3), (2, 0, 3, 1, 0)) if size < 10_000 else ((2, 2), (2, 0, 1))


def exact_case(case):
    return replace(
        case,
        **{
            f.name: double(getattr(case, f.name))
            for f in fields(case)
            if isinstance(getattr(case, f.name), torch.Tensor)
        },
    )


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", [0, 1], ids=["fanout", "uneven"])
@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_DTYPES)
def test_flow_logprob_and_its_gradient(size, dtype, kind, guided, device):
    case = tree(trees(size)[kind], size, dtype)
    upstream = randn(len(case.parent), seed=9)
    velocities = [case.v, case.v_old] if guided else [case.v]

    def run(change):
        v, *u = (change(t).detach().requires_grad_() for t in velocities)
        options = {"v_uncond": u[0], "guidance_scale": 3.7} if guided else {}
        logp = flow_logprob(
            change(case.x), v, change(case.x_next), change(case.coef), **change(case.children), **options
        )
        return [logp.detach(), *torch.autograd.grad(logp, [v, *u], change(upstream))]

    ours = run(lambda value: moved(value, device))
    with use_backend("reference"):
        eager, exact = run(single), run(double)
    assert all(gradient.dtype == dtype for gradient in ours[1:])
    for results in zip(ours, eager, exact, strict=True):
        assert_as_exact_as_the_reference(*results)


@pytest.mark.parametrize("mode", LOSS_MODES)
@pytest.mark.parametrize(
    ("size", "dtype", "kind"),
    [(*case, kind) for case in CASES for kind in ((0, 1) if case[0] in (63, 40_007) else (1,))],
)
def test_grpo_loss_and_its_gradients(size, dtype, kind, mode, device):
    """The single pass and autograd give the same gradient;
    scaled by 3 from above, it is that of the float64 formulas (MATH §3).
    """
    case = tree(trees(size)[kind], size, dtype)
    positional, options, naive = loss_arguments(case, **LOSS_MODES[mode])
    guided = options["v_uncond"] is not None

    def run(change):
        arguments, keywords = change(positional), change(options)
        v, u = arguments[1].requires_grad_(), keywords["v_uncond"].requires_grad_() if guided else None
        out = grpo_loss(*arguments, **keywords)
        gradients = torch.autograd.grad(3 * out.loss, [v, u] if guided else [v])
        single_pass = grpo_loss_and_grad(*arguments, **keywords)
        return (
            out,
            gradients,
            single_pass,
            torch.autograd.grad(grpo_loss(*arguments, **keywords).loss, [v, u] if guided else [v]),
        )

    out, gradients, (again, *in_one_pass), plain = run(lambda value: moved(value, device))
    assert all(torch.equal(left, right) for left, right in zip(out, again, strict=True))
    assert all(torch.equal(left, right) for left, right in zip(in_one_pass, plain, strict=False))
    with use_backend("reference"):
        eager, eager_gradients, *_ = run(single)
    exact_v, exact_u = double(case.v).requires_grad_(), double(options["v_uncond"]).requires_grad_() if guided else None
    loss, *exact = naive_loss(exact_case(case), exact_v, CLIP_LOW, CLIP_HIGH, **double(naive) | {"v_uncond": exact_u})
    exact_gradients = torch.autograd.grad(3 * loss, [exact_v, exact_u] if guided else [exact_v])
    assert torch.equal(out.clipped.cpu(), eager.clipped)
    for name, value in zip(("loss", "logp", "ratio", "kl"), (loss, *exact), strict=True):
        assert_as_exact_as_the_reference(getattr(out, name).detach(), getattr(eager, name).detach(), value.detach())
    for results in zip(gradients, eager_gradients, exact_gradients, strict=True):
        assert_as_exact_as_the_reference(*results)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("size", "dtype"), SIZES_AND_DTYPES)
def test_clean_estimate(size, dtype, guided, device):
    arguments = [randn(2, size, seed=1), randn(2, size, seed=2).to(dtype), torch.tensor([0.9, 0.3])]
    options = {"v_uncond": randn(2, size, seed=3).to(dtype), "guidance_scale": 3.7} if guided else {}
    ours = clean_estimate(*moved(arguments, device), **moved(options, device))
    with use_backend("reference"):
        eager, exact = (clean_estimate(*change(arguments), **change(options)) for change in (single, double))
    assert_as_exact_as_the_reference(ours, eager, exact)


@pytest.mark.parametrize("size", [1, 3, 63, 129, 1024, 1031, 40_007])
def test_noise(size, device):
    """MATH §2: Philox's integers are bit-equal (or normals would differ wholly),
    the normals of them within 1e-6·max(1, |z|).
    """
    word = 2**32 - 1
    rows = [
        (0, 0, 0, 0, 0),
        (word, word, word, word, word),
        (word, 7, INITIAL_STEP, 250_000, 0),
        (3, word, 2**31 - 2, 0, word),
    ]
    key = NoiseKey(*torch.tensor(rows).T)
    ours = philox_normal((4, size), moved(key, device), device=device).cpu()
    expected = torch.from_numpy(normal_reference(rows, size))
    with use_backend("reference"):
        reference = philox_normal((4, size), key).double()
    for exact in (expected, reference):
        assert ((ours - exact).abs() <= 1e-6 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_half_precision_number_is_read_exactly(dtype, device):
    """Subnormals, infinities and NaN too: x̂0 = 0 − (−1)·v."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(8, -1)
    # Triton's interpreter (3.9) reads bf16 subnormals wrongly, a GPU does not
    if dtype == BF16 and os.environ.get("TRITON_INTERPRET") == "1":
        v = torch.where(v.abs() < torch.finfo(dtype).tiny, 0.0, v)
    read = clean_estimate(torch.zeros(v.shape, device=device), v.to(device), -1.0).cpu()
    assert numpy.array_equal(read.numpy(), v.float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_are_rounded_to_the_nearest_half_precision_number(dtype, device):
    """With x = v = 0, b = 1 and κ = D/2 the gradient of logp is x' itself, for numbers on,
    between and beside those of the dtype.
    """
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    between = (values[1:].double() + values[:-1].double()).div(2).float()
    beyond = torch.tensor(
        [torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps * part) for part in (0.2, 0.26, 1.0)]
    ).clamp(max=torch.finfo(F32).max)
    numbers = torch.cat(
        [
            values,
            between,
            between.nextafter(torch.tensor(1e38)),
            between.nextafter(torch.tensor(-1e38)),
            beyond,
            -beyond,
        ]
    )
    numbers = numbers[numbers.abs() >= torch.finfo(F32).tiny]
    x_next = numbers[: len(numbers) // 2 * 2].view(2, -1)
    size = x_next.shape[1]
    coef = row(1.0, 1.0, 0.0, 1.0, size / 2, 0.0)[[0, 0]]
    v = torch.zeros(2, size, dtype=dtype, device=device).requires_grad_()
    logp = flow_logprob(torch.zeros(2, size, device=device), v, x_next.to(device), moved(coef, device))
    (gradient,) = torch.autograd.grad(logp, v, torch.ones(2, device=device))
    assert torch.equal(gradient.cpu(), x_next.to(dtype))


def test_the_rule_and_the_fixture_see_mistakes():
    assert torch.empty(3).isnan().all()
    exact = randn(5, seed=1, dtype=torch.float64)
    eager = exact.float()
    assert_as_exact_as_the_reference(eager, eager, exact)
    for wrong in (eager * (1 + 1e-5), torch.full((5,), torch.nan), exact.to(BF16) * 1.02):
        with pytest.raises(AssertionError):
            assert_as_exact_as_the_reference(wrong, eager, exact)


@pytest.mark.parametrize(
    "device", [pytest.param((EMULATED, "cpu"), id=EMULATED, marks=NEEDS_A_COMPILER)], indirect=True
)
@pytest.mark.parametrize(("size", "dtype"), [(3, F32), (129, BF16), (1032, F16), (16_392, BF16), (9001, F32)])
def test_emulated_kernels_are_as_exact_as_the_reference(size, dtype, device):
    for mode in STEPS:
        test_flow_step(size, dtype, mode, device)
    for kind in (0, 1):
        test_flow_logprob_and_its_gradient(size, dtype, kind, True, device)
        for mode in ("density", "guard, kl, guidance", "on-policy, kl, guidance"):
            test_grpo_loss_and_its_gradients(size, dtype, kind, mode, device)
    test_clean_estimate(size, dtype, True, device)
    test_noise(size, device)
