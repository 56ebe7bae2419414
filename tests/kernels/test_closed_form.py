"""MATH §6: Gaussian data has an exact affine velocity,
so mean and variance go through the rows in float64 without sampling.
"""

import math

import pytest
import torch

from flowgrove_kernels import StepCoefficients, dpmpp_2m_coefficients, flow_step, grpo_loss_and_grad, step_coefficients
from kernel_cases import randn

NOISE_LEVEL = {"ode": 0.0, "dance_sde": 0.3, "wan_sde": 0.0, "flow_sde": 0.7, "cps": 0.7}


def linear_table(steps, start=1.0):
    return [start * (1 - i / steps) for i in range(steps)] + [0.0]


def shifted_table(steps, shift):
    return [shift * t / ((1 - t) + shift * t) for t in linear_table(steps)]


def rows_of(dynamics, sigmas):
    """float64 rows (a, b, c, s) of the whole table; the last step is never stochastic (MATH §1, End points)."""
    here, there = torch.tensor(sigmas[:-1], dtype=torch.float64), torch.tensor(sigmas[1:], dtype=torch.float64)
    if dynamics == "dpmpp_2m":
        middle = dpmpp_2m_coefficients(here[:-1], here[1:], there[1:], dtype=torch.float64)
        coef = StepCoefficients.cat([step_coefficients("ode", sigmas[0], sigmas[1], dtype=torch.float64), middle])
    else:
        options = {"noise_level": NOISE_LEVEL[dynamics], "sigma_max": sigmas[1], "dtype": torch.float64}
        last = step_coefficients("ode", sigmas[-2], sigmas[-1], dtype=torch.float64)
        coef = StepCoefficients.cat([step_coefficients(dynamics, here[:-1], there[:-1], **options), last])
    assert coef.std.dtype == torch.float64
    return list(zip(*(column.tolist() for column in (coef.x_coef, coef.v_coef, coef.prev_coef, coef.std)), strict=True))


def exact_variance(sigma, tau):
    return (1 - sigma) ** 2 * tau**2 + sigma**2


def propagate(dynamics, sigmas, m, tau):
    """(mean, variance) after every step, from the exact marginal of N(m, τ²) at sigmas[0];
    v = E[ε − x0 | x] = −m + slope·(x − (1−σ)m).
    """
    # x = mean + gain·(deviation at the start) + independent noise of this variance
    mean = (1 - sigmas[0]) * m
    gain = 1.0
    noise = 0.0
    start = exact_variance(sigmas[0], tau)
    clean_mean, clean_gain = 0.0, 0.0
    history = []
    for sigma, (a, b, c, s) in zip(sigmas, rows_of(dynamics, sigmas), strict=False):
        slope = (sigma - (1 - sigma) * tau**2) / exact_variance(sigma, tau)
        v_mean, v_gain = -m + slope * (mean - (1 - sigma) * m), slope * gain
        next_mean, next_gain = a * mean + b * v_mean + c * clean_mean, a * gain + b * v_gain + c * clean_gain
        clean_mean, clean_gain = mean - sigma * v_mean, gain - sigma * v_gain
        mean, gain, noise = next_mean, next_gain, (a + b * slope) ** 2 * noise + s * s
        history.append((mean, gain**2 * start + noise))
    return history


def std_error(dynamics, sigmas, m=0.7, tau=0.5):
    return math.sqrt(propagate(dynamics, sigmas, m, tau)[-1][1]) / tau - 1


@pytest.mark.parametrize("steps", [2, 5, 25, 200])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dynamics", ["ode", "flow_sde", "dance_sde", "wan_sde", "cps", "dpmpp_2m"])
def test_the_mean_is_exact_at_every_step(dynamics, shift, steps):
    sigmas = shifted_table(steps, shift)
    means = [mean for mean, _ in propagate(dynamics, sigmas, 0.7, 0.5)]
    assert means == pytest.approx([(1 - sigma) * 0.7 for sigma in sigmas[1:]], rel=0, abs=1e-12)


@pytest.mark.parametrize("dynamics", ["ode", "dance_sde", "wan_sde"])
def test_first_order_dynamics_converge_with_order_one(dynamics):
    coarse, fine = (std_error(dynamics, linear_table(steps)) for steps in (200, 400))
    assert 1.9 <= coarse / fine <= 2.1
    assert 0 < abs(fine) <= 4e-3


def test_dpmpp_2m_converges_with_order_two():
    errors = [std_error("dpmpp_2m", linear_table(steps), m=0.3, tau=1.0) for steps in (100, 200, 400)]
    assert 3.4 <= errors[0] / errors[1] <= 4.1
    assert 3.4 <= errors[1] / errors[2] <= 4.1
    assert 0 < abs(errors[2]) <= 2e-5


def test_flow_sde_below_sigma_one_converges_with_order_one():
    coarse, fine = (std_error("flow_sde", linear_table(steps, start=0.9), tau=0.5) for steps in (200, 400))
    assert 1.9 <= coarse / fine <= 2.1
    assert 0 < 0.5 * abs(fine) <= 1e-3  # of the std itself, τ = .5: the relative error is 1.56e-3
    assert abs(2 * fine - coarse) <= 5e-5  # Richardson: the limit is exact


def test_flow_sde_from_sigma_one_starts_with_the_known_excess_variance():
    sigmas = linear_table(400)
    excess = propagate("flow_sde", sigmas, 0.7, 0.5)[0][1] / exact_variance(sigmas[1], 0.5)
    assert excess == pytest.approx(1 + 0.7**4 / 4, abs=0.002)


@pytest.mark.parametrize("steps", [50, 100, 400, 1600, 6400])
def test_flow_sde_from_sigma_one_stays_accurate(steps):
    assert 0 < abs(std_error("flow_sde", linear_table(steps))) <= 4e-3


@pytest.mark.parametrize("eta", [0.1, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("sigma", "there"), [(1.0, 0.9), (0.8, 0.3), (0.2, 0.05)])
def test_cps_preserves_both_coefficients_when_the_velocity_is_known(sigma, there, eta):
    """x = (1−σ)x0 + σε and v = ε − x0: a step leaves (1−σ')x0 and noise of variance σ'²."""
    coef = step_coefficients("cps", sigma, there, noise_level=eta, dtype=torch.float64)
    a, b, s = coef.x_coef.item(), coef.v_coef.item(), coef.std.item()
    assert s > 0
    assert a * (1 - sigma) - b == pytest.approx(1 - there, rel=0, abs=1e-14)
    assert (a * sigma + b) ** 2 + s**2 == pytest.approx(there**2, rel=1e-13)


@pytest.mark.parametrize(
    ("dynamics", "g"), [("dance_sde", 0.7), ("flow_sde", 0.7 * math.sqrt(0.6 / 0.4)), ("wan_sde", 0.9 * 0.6)]
)
def test_euler_maruyama_leaves_the_noise_of_the_end_point_formula(dynamics, g):
    sigma, there = 0.6, 0.45
    coef = step_coefficients(dynamics, sigma, there, noise_level=0.7, sigma_max=0.9, dtype=torch.float64)
    a, b, s, dt = coef.x_coef.item(), coef.v_coef.item(), coef.std.item(), there - sigma
    assert a * (1 - sigma) - b == pytest.approx(1 - there, rel=0, abs=1e-14)
    assert (a * sigma + b) ** 2 + s**2 == pytest.approx(
        there**2 + g**2 * dt**2 / sigma + g**4 * dt**2 / (4 * sigma**2), rel=1e-13
    )


@pytest.mark.parametrize("group", [2, 4, 12])
@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "wan_sde"])
def test_policy_gradient_of_a_linear_reward(dynamics, group):
    """R = wᵀx', advantages over n samples, weight 1/n: E[∂L/∂v] = −(b/(sD))·((n−1)/n)·c4(n)·w/‖w‖."""
    repeats, size = 40_000 // group, 5
    coef = step_coefficients(dynamics, 0.7, 0.6, noise_level=0.7, sigma_max=0.9)[[0] * repeats]
    x, v = (randn(1, size, seed=seed).expand(repeats, size) for seed in (1, 2))
    noise, reward_weights = randn(repeats * group, size, seed=3 + group), torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3])
    x_next, logp = flow_step(x, v, coef, noise=noise, fanout=group)
    reward = (x_next @ reward_weights).double().view(repeats, group)
    advantage = ((reward - reward.mean(1, keepdim=True)) / reward.std(1, keepdim=True)).flatten().float()
    weight = torch.full_like(advantage, 1 / group)
    _, gradient, _ = grpo_loss_and_grad(x, v, x_next, coef, logp, advantage, weight, clip_range=0.2, fanout=group)

    c4 = math.sqrt(2 / (group - 1)) * math.gamma(group / 2) / math.gamma((group - 1) / 2)
    b, s = coef.v_coef[0].item(), coef.std[0].item()
    expected = -b / (s * size) * (group - 1) / group * c4 * (reward_weights / reward_weights.norm()).double()
    mean, error = gradient.double().mean(0), gradient.double().std(0) / math.sqrt(repeats)
    assert (error < 0.05 * expected.norm()).all()
    assert ((mean - expected).abs() < 4.5 * error).all()
