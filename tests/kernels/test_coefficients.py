"""Rows of step coefficients against the table of MATH §1, written out here with plain floats."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrove_kernels import StepCoefficients, clean_estimate, dpmpp_2m_coefficients, flow_step, step_coefficients
from kernel_cases import SIGMA_MAX, randn, stochastic_rows

FIELDS = ("x_coef", "v_coef", "prev_coef", "std", "precision", "log_norm")
DYNAMICS = ("ode", "flow_sde", "dance_sde", "wan_sde", "cps")
LEVELS = ((1.0, 0.95), (0.95, 0.9), (0.8, 0.55), (0.5, 0.49), (0.2, 0.05), (0.07, 0.0))
HALF_LOG_TWO_PI = 0.9189385332046727


def expected_row(dynamics, sigma, there, eta, sigma_max):
    """(a, b, c, s, κ, log_norm) of one step."""
    dt = there - sigma
    if dynamics == "cps":
        s, q = there * math.sin(eta * math.pi / 2), there * math.cos(eta * math.pi / 2)
        row = ((1 - there) + q, -(1 - there) * sigma + q * (1 - sigma), 0.0, s, 1.0, 0.0)
    else:
        g = {
            "ode": 0.0,
            "flow_sde": eta * math.sqrt(sigma / (1 - min(sigma, sigma_max))),
            "dance_sde": eta,
            "wan_sde": sigma_max * sigma,
        }[dynamics]
        s = g * math.sqrt(-dt)
        row = (1 + g * g * dt / (2 * sigma), dt * (1 + g * g * (1 - sigma) / (2 * sigma)), 0.0, s)
        row += (0.0, 0.0) if s == 0 else (1 / (2 * s * s), -math.log(s) - HALF_LOG_TWO_PI)
    return (1.0, dt, 0.0, 0.0, 0.0, 0.0) if s == 0 else row


def values(coef, index=0):
    return tuple(getattr(coef, name)[index].item() for name in FIELDS)


def assert_same_rows(left, right):
    for name in FIELDS:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize(("sigma", "there"), LEVELS)
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_rows_follow_the_table_to_fp32_rounding(dynamics, sigma, there):
    coef = step_coefficients(dynamics, sigma, there, noise_level=0.7, sigma_max=SIGMA_MAX)
    assert all(getattr(coef, name).dtype == torch.float32 and getattr(coef, name).shape == (1,) for name in FIELDS)
    assert values(coef) == pytest.approx(expected_row(dynamics, sigma, there, 0.7, SIGMA_MAX), rel=1.2e-7, abs=0)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_float64_rows_follow_the_table_and_round_to_the_fp32_rows(dynamics):
    here, there = (torch.tensor(column, dtype=torch.float64) for column in zip(*LEVELS, strict=True))
    exact = step_coefficients(dynamics, here, there, noise_level=0.7, sigma_max=SIGMA_MAX, dtype=torch.float64)
    rounded = step_coefficients(dynamics, here, there, noise_level=0.7, sigma_max=SIGMA_MAX)
    for i, (sigma, sigma_next) in enumerate(LEVELS):
        assert values(exact, i) == pytest.approx(
            expected_row(dynamics, sigma, sigma_next, 0.7, SIGMA_MAX), rel=1e-12, abs=1e-15
        )
    assert_same_rows(StepCoefficients(*(getattr(exact, name).float() for name in FIELDS)), rounded)


@settings(max_examples=60)
@given(
    st.sampled_from(DYNAMICS),
    st.lists(st.tuples(st.floats(0.02, 0.99), st.floats(0.0, 0.98)), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
)
def test_tensors_give_the_rows_of_their_elements_one_by_one(dynamics, levels, eta):
    here = torch.tensor([sigma for sigma, _ in levels], dtype=torch.float64)
    there = here * torch.tensor([share for _, share in levels], dtype=torch.float64)
    together = step_coefficients(dynamics, here, there, noise_level=eta, sigma_max=0.99)
    alone = [
        step_coefficients(dynamics, h, t, noise_level=eta, sigma_max=0.99)
        for h, t in zip(here.tolist(), there.tolist(), strict=True)
    ]
    assert_same_rows(together, StepCoefficients.cat(alone))
    assert len(together) == len(levels)


@pytest.mark.parametrize(
    ("dynamics", "sigma_next", "eta"),
    [("flow_sde", 0.6, 0.0), ("dance_sde", 0.6, 0.0), ("cps", 0.6, 0.0), ("cps", 0.0, 0.7), ("ode", 0.6, 0.7)],
)
def test_a_row_without_noise_is_the_euler_row(dynamics, sigma_next, eta):
    a, b, c, s, kappa, log_norm = values(
        step_coefficients(dynamics, 0.8, sigma_next, noise_level=eta, sigma_max=SIGMA_MAX)
    )
    assert (a, c, s, kappa, log_norm) == (1.0, 0.0, 0.0, 0.0, 0.0)
    assert b == pytest.approx(sigma_next - 0.8, rel=1.2e-7)


def test_sigma_max_caps_flow_sde_at_the_first_step_only():
    first = step_coefficients("flow_sde", 1.0, 0.9, noise_level=0.7, sigma_max=0.9)
    assert first.std.item() == pytest.approx(0.7 * math.sqrt(1.0 / 0.1) * math.sqrt(0.1), rel=1e-6)
    for sigma in (0.9, 0.5):
        capped = step_coefficients("flow_sde", sigma, 0.3, noise_level=0.7, sigma_max=0.9)
        assert_same_rows(capped, step_coefficients("flow_sde", sigma, 0.3, noise_level=0.7))


@pytest.mark.parametrize("sigma", [1.0, torch.tensor([0.9, 1.0], dtype=torch.float64)])
def test_flow_sde_at_sigma_one_needs_sigma_max(sigma):
    with pytest.raises(ValueError, match="sigma_max"):
        step_coefficients("flow_sde", sigma, 0.5, noise_level=0.7)


def test_wan_sde_needs_sigma_max():
    with pytest.raises(ValueError, match="sigma_max"):
        step_coefficients("wan_sde", 0.9, 0.5)


def test_unknown_dynamics_names_the_choices():
    with pytest.raises(ValueError, match="euler") as error:
        step_coefficients("euler", 0.9, 0.5)
    assert all(name in str(error.value) for name in DYNAMICS)


@pytest.mark.parametrize(
    ("sigma", "sigma_next"), [(0.5, 0.5), (0.5, 0.6), (0.5, -0.1), (1.1, 0.5), (math.nan, 0.5), (0.0, 0.0)]
)
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_levels_must_fall_inside_zero_and_one(dynamics, sigma, sigma_next):
    with pytest.raises(ValueError, match="sigma"):
        step_coefficients(dynamics, sigma, sigma_next, noise_level=0.5, sigma_max=0.9)
    levels = torch.tensor([[0.9, sigma], [0.3, sigma_next]], dtype=torch.float64)
    with pytest.raises(ValueError, match="sigma"):
        step_coefficients(dynamics, levels[0], levels[1], noise_level=0.5, sigma_max=0.9)


@pytest.mark.parametrize("sigma", [torch.tensor([0.9]), torch.tensor([[0.9]], dtype=torch.float64)])
def test_levels_are_floats_or_one_dimensional_float64(sigma):
    with pytest.raises(ValueError, match="sigma"):
        step_coefficients("ode", sigma, 0.5)


def test_rows_are_chosen_joined_and_moved():
    coef = stochastic_rows(5)
    assert len(coef) == 5
    for rows, expected in (
        (slice(1, 3), [1, 2]),
        (torch.tensor([4, 0, 0]), [4, 0, 0]),
        (torch.arange(5) > 2, [3, 4]),
        ([2, 1], [2, 1]),
        (3, [3]),
        (-1, [4]),
    ):
        chosen = coef[rows]
        assert [values(chosen, i) for i in range(len(chosen))] == [values(coef, i) for i in expected]
    assert_same_rows(StepCoefficients.cat([coef[:2], coef[2:]]), coef)
    assert len(coef[:0]) == 0
    assert_same_rows(coef.to("cpu"), coef)
    assert all(getattr(coef.to("meta"), name).device.type == "meta" for name in FIELDS)


def test_rows_are_gone_through_one_by_one():
    coef = stochastic_rows(3)
    assert [values(one) for one in coef] == [values(coef, i) for i in range(3)]
    for index in (numpy.int64(1), torch.tensor(1), -2, range(1, 2), numpy.array([1])):
        assert_same_rows(coef[index], coef[1:2])
    assert len(coef[[]]) == 0
    for index in (3, -4, numpy.int64(3)):
        with pytest.raises(IndexError, match="there are 3 rows"):
            coef[index]
    for index in (None, "a", 1.0, True, torch.tensor(True), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"the index of coef is .*: pass an int, a slice"):
            coef[index]


def test_rows_of_a_solver_that_cannot_be_held_are_not_blamed_on_noise():
    levels = (1e-5, math.nextafter(1e-5, 0), 1e-6)  # of one log-SNR
    with pytest.raises(ValueError, match=r"dpmpp_2m gives a row .* take sigmas further apart$"):
        dpmpp_2m_coefficients(*levels)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ((1.0, 2.0), "is .1.0, 2.0.: pass StepCoefficients"),
        (stochastic_rows(2).to("meta"), "is torch.float32 .2. on meta: pass torch.float32 on cpu, like the first"),
        (step_coefficients("ode", 0.9, 0.8, dtype=torch.float64), "is torch.float64 .1. on cpu: pass torch.float32"),
    ],
)
def test_joined_rows_are_of_one_kind(part, text):
    with pytest.raises(ValueError, match=rf"part 1 of StepCoefficients\.cat {text}"):
        StepCoefficients.cat([stochastic_rows(3), part])


def test_rows_are_equal_to_themselves_alone():
    coef, same = stochastic_rows(3), stochastic_rows(3)
    assert coef == coef  # noqa: PLR0124
    assert coef != same
    assert coef in {coef: 1}


@pytest.mark.parametrize(
    ("dynamics", "levels", "options", "text"),
    [
        ("flow_sde", (1.0, 0.9), {"sigma_max": 1.0}, "sigma_max < 1: pass the second entry"),
        ("flow_sde", (0.9, 0.8), {"noise_level": 1e30}, "noise_level 1e.30 gives a row that torch.float32 cannot hold"),
        ("dance_sde", (0.9, 0.8), {"noise_level": 1e-30}, "nearer 1 .0 for no noise"),
        ("flow_sde", (0.9, 0.8), {"noise_level": "1"}, "noise_level is '1': write a number >= 0"),
        ("flow_sde", (0.9, 0.8), {"noise_level": math.nan}, "noise_level is nan"),
        ("wan_sde", (0.9, 0.8), {"sigma_max": "a"}, "sigma_max is 'a'"),
        ("ode", ([0.9], 0.8), {}, r"sigma is \[0.9\]: pass a float or a float64"),
        ("ode", (0.9, numpy.array([0.8])), {}, "sigma_next is a ndarray: pass a float or"),
        ("ode", (torch.tensor([0.9, 0.8], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)), {}, "2, 3. rows"),
        (["ode"], (0.9, 0.8), {}, "unknown dynamics"),
        (
            "wan_sde",
            (0.9, 0.8),
            {"sigma_max": 1e-30},
            "wan_sde with sigma_max 1e.30 gives .* apart, or a sigma_max nearer 1",
        ),
    ],
)
def test_rows_that_cannot_be_made_are_errors(dynamics, levels, options, text):
    with pytest.raises(ValueError, match=text) as error:
        step_coefficients(dynamics, *levels, **{"noise_level": 0.7} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("level", [0.5, 1.0, 1.4])
def test_cps_keeps_the_noise_of_the_next_level(level):
    """a = (1−σ') + q with q ≥ 0 and q² + s² = σ'²."""
    rows = step_coefficients("cps", 0.9, 0.8, noise_level=level, dtype=torch.float64)
    q = rows.x_coef.item() - 0.2
    assert q >= 0
    assert q**2 + rows.std.item() ** 2 == pytest.approx(0.8**2)
    assert rows.v_coef.item() == pytest.approx(0.1 * q - 0.2 * 0.9)


@pytest.mark.parametrize(("before", "sigma", "there"), [(0.9, 0.8, 0.6), (0.5, 0.3, 0.25), (0.99, 0.98, 0.01)])
def test_dpmpp_2m_rows_follow_the_midpoint_rule(before, sigma, there):
    lam_before, lam, lam_next = (math.log((1 - level) / level) for level in (before, sigma, there))
    dt = there - sigma
    c = (lam_next - lam) / (2 * (lam - lam_before)) * dt / sigma
    assert values(dpmpp_2m_coefficients(before, sigma, there)) == pytest.approx(
        (1 - c, dt + sigma * c, c, 0.0, 0.0, 0.0), rel=1.2e-7, abs=0
    )
    exact = values(dpmpp_2m_coefficients(before, sigma, there, dtype=torch.float64))
    assert exact == pytest.approx((1 - c, dt + sigma * c, c, 0.0, 0.0, 0.0), rel=1e-12, abs=0)


def test_dpmpp_2m_step_adds_the_difference_of_clean_estimates():
    x, v, previous = (randn(3, 63, seed=i) for i in range(3))
    coef = dpmpp_2m_coefficients(
        *(torch.tensor(levels, dtype=torch.float64) for levels in ([0.9, 0.5, 0.2], [0.7, 0.4, 0.1], [0.3, 0.35, 0.08]))
    )
    sigma, dt = torch.tensor([0.7, 0.4, 0.1]), torch.tensor([-0.4, -0.05, -0.02])
    c = coef.prev_coef.unsqueeze(1)
    expected = x + dt.unsqueeze(1) * v + c * (previous - clean_estimate(x, v, sigma))
    x_next, logp = flow_step(x, v, coef, history=previous)
    assert (c != 0).all()
    torch.testing.assert_close(x_next, expected, rtol=0, atol=2e-6)
    assert torch.equal(logp, torch.zeros(3))


@pytest.mark.parametrize(("before", "sigma", "there"), [(1.0, 0.9, 0.5), (0.9, 0.4, 0.0), (1.0, 0.5, 0.0)])
def test_dpmpp_2m_is_euler_from_sigma_one_and_into_zero(before, sigma, there):
    coef = dpmpp_2m_coefficients(before, sigma, there)
    assert values(coef) == (1.0, float(numpy.float32(there - sigma)), 0.0, 0.0, 0.0, 0.0)
    assert_same_rows(coef, step_coefficients("ode", sigma, there))


@pytest.mark.parametrize(
    "levels", [(0.5, 0.5, 0.4), (0.4, 0.5, 0.3), (0.6, 0.5, 0.5), (0.6, 0.5, 0.7), (1.2, 0.5, 0.4)]
)
def test_dpmpp_2m_levels_must_fall(levels):
    with pytest.raises(ValueError, match="sigma"):
        dpmpp_2m_coefficients(*levels)


def test_cps_loses_no_noise_to_a_level_beyond_two():
    with pytest.raises(ValueError, match="cps has a noise_level of at most 2"):
        step_coefficients("cps", 0.9, 0.8, noise_level=2.5)
