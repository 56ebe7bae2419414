"""flow_step: one affine-Gaussian step and its log-probability (MATH §1)."""

import math

import numpy
import pytest
import torch

from flowgrove_kernels import (
    NoiseKey,
    clean_estimate,
    dpmpp_2m_coefficients,
    flow_step,
    philox_normal,
    step_coefficients,
)
from kernel_backends import AND_EMULATED
from kernel_cases import ODD_SIZES, assert_equal, pad, randn, row, stochastic_rows

pytestmark = AND_EMULATED

VELOCITY_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def golden_steps(golden, kind):
    """(σ' = 0?, coef, x, v, z, x_next, mean, logp) of every stored step of one dynamics."""
    for i in range(120):
        case = {name: golden[f"step{i:03d}/{name}"] for name in ("kind", "eta", "sigma", "sigma_next", "sigma_max")}
        if str(case["kind"]) == kind:
            levels = float(case["sigma"]), float(case["sigma_next"])
            coef = step_coefficients(kind, *levels, noise_level=float(case["eta"]), sigma_max=float(case["sigma_max"]))[
                [0, 0]
            ]
            yield (
                levels[1] == 0,
                coef,
                *(
                    torch.from_numpy(golden[f"step{i:03d}/{name}"])
                    for name in ("x", "v", "z", "x_next", "mean", "logp")
                ),
            )


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ode"])
def test_steps_of_public_implementations(golden, kind):
    cases = list(golden_steps(golden, kind))
    assert len(cases) == 30
    for last, coef, x, v, z, x_next, mean, logp in cases:
        ours, our_logp = flow_step(x, v, coef, noise=z)
        torch.testing.assert_close(ours, x_next, rtol=0, atol=2e-6)
        torch.testing.assert_close(flow_step(x, v, coef)[0], mean, rtol=0, atol=2e-6)
        torch.testing.assert_close(our_logp, logp, rtol=0, atol=1e-4 if last else 2e-6)


@pytest.mark.parametrize("follow", ["stored states", "own states"])
def test_dpmpp_2m_trajectory_of_a_public_implementation(golden, follow):
    sigmas = golden["dpm0/sigmas"].astype(numpy.float64)
    states, velocities = torch.from_numpy(golden["dpm0/xs"]), torch.from_numpy(golden["dpm0/vs"])
    x, previous = states[0], None
    for i, v in enumerate(velocities):
        x = states[i] if follow == "stored states" else x
        multistep = 0 < i < len(velocities) - 1
        coef = (
            dpmpp_2m_coefficients(*sigmas[i - 1 : i + 2]) if multistep else step_coefficients("ode", *sigmas[i : i + 2])
        )
        x_next, logp = flow_step(x, v, coef[[0, 0]], history=previous)
        previous, x = clean_estimate(x, v, float(sigmas[i])), x_next
        torch.testing.assert_close(x_next, states[i + 1], rtol=0, atol=2e-6 if follow == "stored states" else 5e-6)
        assert torch.equal(logp, torch.zeros(2))
    assert i == 9


@pytest.mark.parametrize("elements", ODD_SIZES)
def test_step_and_log_probability_follow_the_formulas(elements):
    x, v, z, p, coef = *(randn(6, elements, seed=i) for i in range(4)), stochastic_rows(6)
    coef.prev_coef.copy_(torch.linspace(-1, 1, 6))
    x_next, logp = flow_step(x, v, coef, noise=z, history=p)
    assert x_next.dtype == logp.dtype == torch.float32
    assert x_next.shape == x.shape
    assert logp.shape == (6,)
    a, b, c, s = (pad(column, x.double()) for column in (coef.x_coef, coef.v_coef, coef.prev_coef, coef.std))
    mean = a * x + b * v + c * p
    torch.testing.assert_close(x_next.double(), mean + s * z, rtol=0, atol=2e-6)
    expected = coef.log_norm.double() - coef.precision.double() * (s * z).square().mean(1)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=2e-5)


def test_without_noise_the_step_is_its_mean():
    x, v, coef = randn(6, 63, seed=1), randn(6, 63, seed=2), stochastic_rows(6)
    x_next, logp = flow_step(x, v, coef)
    torch.testing.assert_close(
        x_next.double(), pad(coef.x_coef, x.double()) * x + pad(coef.v_coef, x.double()) * v, rtol=0, atol=1e-6
    )
    assert torch.equal(logp, coef.log_norm)  # x' − μ = 0


def test_log_probability_is_computed_from_the_rounded_states():
    """Large states round s·z away; x' − μ of the stored values is what later ops can see."""
    x, v, z = 1000 + randn(4, 129, seed=1), randn(4, 129, seed=2), randn(4, 129, seed=3)
    coef = row(1.0, -0.1, 0.0, 1e-4, 1.0 / (2 * 1e-8), 0.0)[[0] * 4]
    x_next, logp = flow_step(x, v, coef, noise=z)
    mean, _ = flow_step(x, v, coef)
    stored = -coef.precision.double() * (x_next.double() - mean.double()).square().mean(1)
    unrounded = -0.5 * z.double().square().mean(1)
    torch.testing.assert_close(logp.double(), stored, rtol=1e-5, atol=0)
    assert ((stored - unrounded).abs() > 1e-3).all()  # the two differ, so the check above tells them apart


@pytest.mark.parametrize("fanout", [1, 2, 3])
def test_child_c_of_row_p_is_row_p_fanout_plus_c(fanout):
    x, v, z, coef = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2), randn(4 * fanout, 3, 5, seed=3), stochastic_rows(4)
    x_next, logp = flow_step(x, v, coef, noise=z, fanout=fanout)
    assert x_next.shape == (4 * fanout, 3, 5)
    assert logp.shape == (4 * fanout,)
    for p in range(4):
        for c in range(fanout):
            e = p * fanout + c
            alone = flow_step(x[p : p + 1], v[p : p + 1], coef[[p]], noise=z[e : e + 1])
            assert_equal(alone, (x_next[e : e + 1], logp[e : e + 1]))
    mean, _ = flow_step(x, v, coef, fanout=fanout)
    assert torch.equal(mean, flow_step(x, v, coef)[0].repeat_interleave(fanout, 0))


@pytest.mark.parametrize("elements", ODD_SIZES)
@pytest.mark.parametrize("fanout", [1, 3])
def test_a_key_and_the_noise_it_names_are_equal(elements, fanout):
    x, v, coef = randn(3, elements, seed=1), randn(3, elements, seed=2), stochastic_rows(3)
    key = NoiseKey(11, 2, torch.arange(3).repeat_interleave(fanout), 5, torch.arange(3 * fanout))
    named, explicit = (
        flow_step(x, v, coef, fanout=fanout, **how)
        for how in ({"key": key}, {"noise": philox_normal((3 * fanout, elements), key)})
    )
    assert_equal(named, explicit)
    assert not torch.equal(named[0], flow_step(x, v, coef, fanout=fanout)[0])


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES)
@pytest.mark.parametrize("elements", ODD_SIZES)
def test_every_row_is_independent_of_its_batch(dtype, elements):
    x, v, u, p, coef = *(randn(5, elements, seed=i) for i in range(4)), stochastic_rows(5)
    v, u, node = v.to(dtype), u.to(dtype), torch.tensor([7, 3, 9, 0, 2])

    def step(rows):
        key = NoiseKey(1, 2, 3, 4, node[rows])
        return flow_step(x[rows], v[rows], coef[rows], key=key, history=p[rows], v_uncond=u[rows], guidance_scale=3.5)

    together = step(torch.arange(5))
    for rows in ([0], [1], [2], [3], [4], [4, 2, 0, 1, 3], [3, 3, 1]):
        assert_equal(step(torch.tensor(rows)), [t[rows] for t in together])


@pytest.mark.parametrize("dtype", VELOCITY_DTYPES)
def test_velocity_of_any_dtype_is_promoted_to_the_state(dtype):
    x, v, z, coef = randn(4, 63, seed=1), randn(4, 63, seed=2).to(dtype), randn(4, 63, seed=3), stochastic_rows(4)
    x_next, logp = flow_step(x, v, coef, noise=z)
    assert x_next.dtype == logp.dtype == torch.float32
    assert_equal((x_next, logp), flow_step(x, v.float(), coef, noise=z))


def test_float64_states_are_computed_in_float64():
    x, v, z = (randn(4, 63, seed=i, dtype=torch.float64) for i in range(3))
    coef = stochastic_rows(4)
    x_next, logp = flow_step(x, v, coef, noise=z)
    assert x_next.dtype == logp.dtype == torch.float64
    mean = pad(coef.x_coef, x) * x + pad(coef.v_coef, x) * v
    torch.testing.assert_close(x_next, mean + pad(coef.std, x) * z, rtol=0, atol=1e-14)
    expected = coef.log_norm.double() - coef.precision.double() * (x_next - mean).square().mean(1)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.5])
def test_guidance_mixes_the_two_velocities(gamma):
    x, v, u, z, coef = *(randn(4, 63, seed=i) for i in range(4)), stochastic_rows(4)
    mixed = (u.double() + gamma * (v.double() - u.double())).float()
    x_next, logp = flow_step(x, v, coef, noise=z, v_uncond=u, guidance_scale=gamma)
    expected = flow_step(x, mixed, coef, noise=z)
    torch.testing.assert_close(x_next, expected[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(logp, expected[1], rtol=0, atol=1e-5)


def test_strided_inputs_equal_contiguous_ones():
    wide = [randn(3, 7, 5, 4, seed=i) for i in range(5)]
    x, v, u, p, z = (t.permute(0, 3, 1, 2)[:, ::2, :, 1:] for t in wide)
    assert not x.is_contiguous()
    coef = stochastic_rows(3)
    ours = flow_step(x, v, coef, noise=z, history=p, v_uncond=u, guidance_scale=2.0)
    x, v, u, p, z = (t.contiguous() for t in (x, v, u, p, z))
    expected = flow_step(x, v, coef, noise=z, history=p, v_uncond=u, guidance_scale=2.0)
    assert_equal(ours, expected)
    spread = v[:1].expand(3, *v.shape[1:])
    assert torch.equal(flow_step(x, spread, coef, noise=z)[0], flow_step(x, spread.contiguous(), coef, noise=z)[0])


@pytest.mark.parametrize("how", [{}, {"noise": torch.zeros(0, 4, 3)}, {"key": NoiseKey(1, 2, 3, 4, 5)}])
def test_an_empty_batch_is_a_batch(how):
    x = torch.zeros(0, 4, 3)
    x_next, logp = flow_step(x, x, stochastic_rows(2)[:0], fanout=2, **how)
    assert x_next.shape == (0, 4, 3)
    assert logp.shape == (0,)
    assert x_next.dtype == logp.dtype == torch.float32


def test_split_noise_scale_draws_wide_but_scores_with_the_plain_density():
    """MATH §1: a row with s × 4 and κ, log_norm of s."""
    x, v, z, coef = randn(1, 1031, seed=1), randn(1, 1031, seed=2), randn(1, 1031, seed=3), stochastic_rows(1)
    wide = row(
        *(getattr(coef, name).item() for name in ("x_coef", "v_coef", "prev_coef")),
        4 * coef.std.item(),
        coef.precision.item(),
        coef.log_norm,
    )
    _, logp = flow_step(x, v, wide, noise=z)
    s = coef.std.item()
    assert logp.item() == pytest.approx(
        -math.log(s) - 0.5 * math.log(2 * math.pi) - 8 * z.square().mean().item(), abs=1e-4
    )


X, V, COEF = torch.zeros(4, 3, 5), torch.zeros(4, 3, 5), stochastic_rows(4)
KEY = NoiseKey(1, 2, 3, 4, torch.arange(4))


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("x", {"x": torch.zeros(4)}),
        ("x", {"x": X.bfloat16()}),
        ("v", {"v": torch.zeros(4, 3, 4)}),
        ("v", {"v": V.long()}),
        ("v", {"v": V.to("meta")}),
        ("coef", {"coef": COEF[:3]}),
        ("coef", {"coef": COEF.to("meta")}),
        ("noise", {"noise": X, "fanout": 2}),
        ("noise", {"noise": X.double()}),
        ("noise", {"noise": X.to("meta")}),
        ("key", {"key": KEY, "noise": X}),
        ("node", {"key": KEY, "fanout": 2}),
        ("history", {"history": torch.zeros(4, 3, 4)}),
        ("history", {"history": X.double()}),
        ("fanout", {"fanout": 0}),
        ("sibling_correlation", {"key": NoiseKey(1, 2, 3, 4, 5, 6), "sibling_correlation": 1.5}),
        ("sibling_correlation", {"key": KEY, "sibling_correlation": 0.5}),
        ("sibling_correlation", {"noise": X, "sibling_correlation": 0.5}),
        ("v_uncond", {"guidance_scale": 2.0}),
        ("guidance_scale", {"v_uncond": V}),
        ("v_uncond", {"v_uncond": torch.zeros(4, 3, 4), "guidance_scale": 2.0}),
    ],
)
def test_wrong_arguments_are_named(argument, changes):
    flow_step(x=X, v=V, coef=COEF)
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        flow_step(**{"x": X, "v": V, "coef": COEF} | changes)
