"""grpo_loss: clipped policy loss, KL and their gradient (MATH §3)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from flowgrove_kernels import (
    NoiseKey,
    StepCoefficients,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    step_coefficients,
)
from kernel_backends import AND_EMULATED
from kernel_cases import (
    CLIP_HIGH,
    CLIP_LOW,
    LOSS_MODES,
    TREES,
    loss_arguments,
    naive_loss,
    pad,
    randn,
    rollout,
    stochastic_rows,
)

pytestmark = AND_EMULATED


@pytest.mark.parametrize("clip", [1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_of_a_public_implementation(golden, dtype, clip):
    g = {
        name.removeprefix("loss0/"): torch.from_numpy(value)
        for name, value in golden.items()
        if name.startswith("loss0/")
    }
    options = {"noise_level": float(g["eta"]), "sigma_max": float(g["sigma_max"]), "dtype": dtype}
    coef = step_coefficients("flow_sde", g["sigma"], g["sigma_next"], **options)
    x, v, v_old, x_next, old_logp, advantage = (
        g[name].to(dtype) for name in ("x", "v", "v_old", "x_next", "logp_old", "adv")
    )
    for old in (old_logp, flow_logprob(x, v_old, x_next, coef)):
        out, grad, _ = grpo_loss_and_grad(
            x, v, x_next, coef, old, advantage, torch.full((6,), 1 / 6, dtype=dtype), clip_range=clip
        )
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        assert out.loss.item() == pytest.approx(float(g[f"loss_{clip}"]), rel=tolerance)
        expected = g[f"grad_{clip}"]
        assert (grad.double() - expected).norm() <= tolerance * expected.norm()
        assert out.clipped.abs().double().mean().item() == pytest.approx(float(g[f"clipfrac_{clip}"]))


@pytest.mark.parametrize("mode", LOSS_MODES.values(), ids=LOSS_MODES)
@pytest.mark.parametrize("children", TREES.values(), ids=TREES)
def test_everything_equals_autograd_of_the_written_formulas(children, mode):
    case = rollout(children, (3, 7))
    positional, ours, naive = loss_arguments(case, **mode)
    v = case.v.clone().requires_grad_()
    u = None if naive["v_uncond"] is None else naive.pop("v_uncond").clone().requires_grad_()
    loss, logp, ratio, kl = naive_loss(case, v, CLIP_LOW, CLIP_HIGH, **naive | {"v_uncond": u})
    loss.backward()
    out, grad, grad_uncond = grpo_loss_and_grad(*positional, **ours)
    for mine, expected in zip(
        (out.loss, out.logp, out.ratio, out.kl, grad), (loss, logp, ratio, kl, v.grad), strict=True
    ):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-11, atol=1e-13)
    assert torch.equal(out.clipped, (ratio > 1 + CLIP_HIGH).to(torch.int8) - (ratio < 1 - CLIP_LOW).to(torch.int8))
    assert v.grad.abs().max() > 1e-3
    assert (grad_uncond is None) == (u is None)
    if u is not None:
        torch.testing.assert_close(grad_uncond, u.grad, rtol=1e-11, atol=1e-13)
    assert set(out.clipped.tolist()) == {0} if "old_logp" in mode else set(out.clipped.tolist()) >= {-1, 1}


@pytest.mark.parametrize("name", [name for name, mode in LOSS_MODES.items() if "old_logp" not in mode])
@pytest.mark.parametrize("children", TREES.values(), ids=TREES)
def test_gradcheck(children, name):
    case = rollout(children[:5], (5,))
    positional, ours, _ = loss_arguments(case, **LOSS_MODES[name])
    velocities = [case.v] if ours["v_uncond"] is None else [case.v, ours["v_uncond"]]

    def loss(v, u=None):
        return grpo_loss(positional[0], v, *positional[2:], **ours | {"v_uncond": u}).loss

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in velocities])


@pytest.mark.parametrize("v_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", LOSS_MODES.values(), ids=LOSS_MODES)
def test_the_single_pass_equals_autograd_bit_for_bit(mode, v_dtype):
    case = rollout(TREES["uneven"], (129,), dtype=torch.float32, v_dtype=v_dtype)
    positional, ours, _ = loss_arguments(case, **mode)
    out, grad, grad_uncond = grpo_loss_and_grad(*positional, **ours)
    v, u = positional[1].requires_grad_(), ours["v_uncond"]
    u = u if u is None else u.requires_grad_()
    again = grpo_loss(positional[0], v, *positional[2:], **ours | {"v_uncond": u})
    again.loss.backward()
    assert all(torch.equal(left, right) for left, right in zip(out, again, strict=True))
    assert grad.dtype == v.dtype
    assert grad.abs().max() > 0
    assert torch.equal(grad, v.grad)
    assert grad_uncond is None if u is None else torch.equal(grad_uncond, u.grad)
    assert [t.requires_grad for t in again] == [True, False, False, False, False]


def test_the_gradient_scales_with_what_comes_from_above():
    case = rollout(TREES["uneven"], (63,))
    positional, ours, _ = loss_arguments(case, kl_weight=0.3)
    _, grad, _ = grpo_loss_and_grad(*positional, **ours)
    (-2.5 * grpo_loss(positional[0], positional[1].requires_grad_(), *positional[2:], **ours).loss).backward()
    torch.testing.assert_close(positional[1].grad, -2.5 * grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("clip_range", [0.1, (0.1, 0.3), (0.3, 0.1)])
@pytest.mark.parametrize(("advantage", "ratio"), list(itertools.product((2.0, -2.0), (0.6, 0.8, 0.95, 1.05, 1.2, 1.5))))
def test_the_clip_rule(advantage, ratio, clip_range):
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    case = rollout([1], (63,))
    v = case.v.requires_grad_()
    logp = flow_logprob(case.x, v, case.x_next, case.coef)
    slope = torch.autograd.grad(logp.sum(), v)[0]
    one = torch.ones(1, dtype=torch.float64)
    out, grad, _ = grpo_loss_and_grad(
        case.x,
        v,
        case.x_next,
        case.coef,
        logp.detach() - math.log(ratio),
        advantage * one,
        0.5 * one,
        clip_range=clip_range,
    )
    removed = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    assert out.ratio.item() == pytest.approx(ratio, rel=1e-12)
    assert out.clipped.item() == (1 if ratio > 1 + high else -1 if ratio < 1 - low else 0)  # whatever the sign of A
    bounded = min(max(ratio, 1 - low), 1 + high)
    assert out.loss.item() == pytest.approx(0.5 * max(-advantage * ratio, -advantage * bounded), rel=1e-12)
    expected = torch.zeros_like(slope) if removed else -0.5 * advantage * ratio * slope
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_the_ratio_is_exactly_one_and_the_density_gradient_flows(dtype):
    case = rollout(TREES["uneven"], (63,), dtype=dtype)
    out, grad, _ = grpo_loss_and_grad(
        *case.positional()[:4], None, case.advantage, case.weight, clip_range=1e-5, **case.children
    )
    assert torch.equal(out.ratio, torch.ones_like(case.advantage))
    assert not out.clipped.any()
    v = case.v.requires_grad_()
    logp = flow_logprob(case.x, v, case.x_next, case.coef, **case.children)
    logp.backward(-case.weight * case.advantage)
    assert torch.equal(out.logp, logp.detach())
    torch.testing.assert_close(
        grad, v.grad, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7 if dtype == torch.float32 else 1e-14
    )
    assert out.loss.item() == pytest.approx(-(case.weight * case.advantage).sum().item(), rel=1e-5)


@pytest.mark.parametrize("correlation", [0.0, 1 / 17])
def test_the_guard_ratio_is_the_mean_of_noise_times_drift(correlation):
    """log ρ = mean(z⊙Δμ), Δμ the movement of the mean since the rollout; z comes back from the key."""
    x, v_old, drift, coef = *(randn(6, 63, seed=i, dtype=torch.float64) for i in range(3)), stochastic_rows(6)
    node = torch.arange(12)
    noise = {"key": NoiseKey(1, 2, 3, 4, node, node // 2), "sibling_correlation": correlation}
    x_next, old_logp = flow_step(x, v_old, coef, fanout=2, **noise)
    old_mean, new_mean = (flow_step(x, v, coef, fanout=2)[0] for v in (v_old, v_old + 0.3 * drift))
    z = (x_next - old_mean) / coef.std.double().repeat_interleave(2).unsqueeze(1)
    ones = torch.ones(12, dtype=torch.float64)
    out = grpo_loss(
        x, v_old + 0.3 * drift, x_next, coef, old_logp, ones, ones, clip_range=0.2, fanout=2, ratio="guard", **noise
    )
    log_ratio = (z * (new_mean - old_mean)).mean(1)
    torch.testing.assert_close(out.ratio.log(), log_ratio, rtol=0, atol=1e-12)
    assert log_ratio.abs().max() > 5e-3


@pytest.mark.parametrize("noise_scale", [1.0, 4.0])
def test_log_ratio_identity_with_a_second_term_that_is_never_positive(noise_scale):
    """MATH §3, Facts: log ρ = 2κ·s_z·mean(z⊙Δμ) − κ·mean(Δμ²);
    s_z is the sampling std, which a row may hold apart from κ.
    """
    case = rollout([2] * 6, (63,))
    coef = StepCoefficients(*(t * noise_scale if t is case.coef.std else t for t in case.coef.tensors()))
    x_next, old_logp = flow_step(case.x, case.v_old, coef, noise=case.noise, fanout=2)
    ones = torch.ones(12, dtype=torch.float64)
    out = grpo_loss(case.x, case.v, x_next, coef, old_logp, ones, ones, clip_range=0.2, fanout=2)
    kappa, std = (t.double()[case.parent] for t in (coef.precision, coef.std))
    moved = (pad(coef.v_coef, case.x) * (case.v - case.v_old))[case.parent]
    first = 2 * kappa * std * (case.noise * moved).mean(1)
    second = out.ratio.log() - first
    torch.testing.assert_close(second, -kappa * moved.square().mean(1), rtol=0, atol=1e-11)
    assert (second < -1e-6).all()


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde", "wan_sde", "cps"])
def test_kl_is_per_dimension_and_divides_by_the_sampling_variance(dynamics):
    x, v, ref = randn(1, 63, seed=1), randn(1, 63, seed=2), randn(1, 63, seed=3)
    coef = step_coefficients(dynamics, 0.7, 0.5, noise_level=0.7, sigma_max=0.9)
    zero, weight = torch.zeros(3), torch.tensor([0.5, 1.0, 2.0])
    x_next, _ = flow_step(x, v, coef, fanout=3)
    out, grad, _ = grpo_loss_and_grad(
        x, v, x_next, coef, None, zero, weight, clip_range=0.1, fanout=3, v_ref=ref, kl_weight=0.25
    )
    b, s = coef.v_coef.item(), coef.std.item()
    kl = b**2 * (v - ref).double().square().mean().item() / (2 * s**2)
    assert out.kl.tolist() == pytest.approx([kl] * 3, rel=1e-5)
    assert out.loss.item() == pytest.approx(0.25 * 3.5 * kl, rel=1e-5)
    torch.testing.assert_close(grad, 2 * 0.25 * 3.5 * b**2 * (v - ref) / (2 * s**2 * 63), rtol=1e-5, atol=1e-7)
    assert torch.equal(grpo_loss(x, v, x_next, coef, None, zero, weight, clip_range=0.1, fanout=3).kl, zero)


@pytest.mark.parametrize("name", [name for name, mode in LOSS_MODES.items() if "kl_weight" not in mode])
def test_zero_advantage_gives_zero_gradient(name):
    case = rollout(TREES["uneven"], (63,), dtype=torch.float32, drift=1.0)
    case = replace(case, advantage=torch.zeros_like(case.advantage))
    positional, ours, _ = loss_arguments(case, **LOSS_MODES[name])
    out, grad, _ = grpo_loss_and_grad(*positional, **ours)
    assert out.loss.item() == 0
    assert not grad.any()
    positional[5] = torch.ones_like(case.advantage)
    assert grpo_loss_and_grad(*positional, **ours)[1].any()
