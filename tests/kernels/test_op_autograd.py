"""What autograd may do to the ops: checkpoint them, keep their inputs elsewhere, differentiate only what they say."""

from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from compat_cases import SIGMAS
from flowgrove_kernels import StepCoefficients, clean_estimate, flow_logprob, flow_step, grpo_loss, grpo_loss_and_grad
from flowgrove_kernels.compat.dance_grpo import flux_step
from flowgrove_kernels.compat.mix_grpo import flow_grpo_step
from flowgrove_kernels.loss_arguments import checked_arguments
from kernel_backends import AND_EMULATED
from op_calls import CLIP, batch_of

pytestmark = AND_EMULATED

B = batch_of(4, 3, 21)
FUNCTIONS = {  # of (v, v_uncond)
    "clean_estimate": lambda v, u: clean_estimate(B.x, v, B.sigma, v_uncond=u, guidance_scale=2.0),
    "flow_logprob": lambda v, u: flow_logprob(B.x, v, B.x_next, B.coef, fanout=2, v_uncond=u, guidance_scale=2.0),
    "grpo_loss": lambda v, u: (
        grpo_loss(B.x, v, B.x_next, B.coef, *B.scores, clip_range=CLIP, fanout=2, v_uncond=u, guidance_scale=2.0).loss
    ),
    "flux_step": lambda v, u: flux_step(v + u, B.x, 0.3, SIGMAS, 2, B.history, True, True)[2],
    "flow_grpo_step": lambda v, u: flow_grpo_step(v + u, B.x, 0.7, SIGMAS, 2, B.history)[2],
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def leaves():
    return B.v.clone().requires_grad_(), B.v_uncond.clone().requires_grad_()


def gradients(run):
    v, u = leaves()
    return torch.autograd.grad(run(v, u).sum(), (v, u))


@every_function
def test_checkpointed_calls_have_the_same_gradients(function):
    found = gradients(lambda v, u: checkpoint(function, v, u, use_reentrant=False))
    assert all(torch.equal(left, right) for left, right in zip(found, gradients(function), strict=True))


@every_function
def test_what_is_saved_is_read_once(function):
    """As on the CPU (torch.autograd.graph.save_on_cpu), where reading is a copy."""
    expected, saved = gradients(function), []

    def read(number):
        tensor, times = saved[number]
        saved[number] = tensor, times + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t, 0)) or len(saved) - 1, read):
        found = gradients(function)
    with torch.autograd.graph.save_on_cpu():
        moved = gradients(function)
    assert max(times for _, times in saved) == 1
    for ours in (found, moved):
        assert all(torch.equal(left, right) for left, right in zip(ours, expected, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_derivatives_are_errors_of_one_line(name):
    v, u = B.v, B.v_uncond
    with pytest.raises(ValueError, match=r"has a tangent, but no op has a forward derivative: .*backward"):
        torch.func.jvp(lambda v: FUNCTIONS[name](v, u), (v,), (v,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="has a tangent"):
        FUNCTIONS[name](v, forward_ad.make_dual(u, u))
    with forward_ad.dual_level():
        FUNCTIONS[name](v, u)  # without a tangent it may be called there


@pytest.mark.parametrize("name", ["history", "x_next", "old_logp", "sigma", "v"])
def test_no_tangent_of_any_argument_is_dropped(name):
    with forward_ad.dual_level():
        value = getattr(B, name)
        b = replace(B, **{name: forward_ad.make_dual(value, value)})
        call = {
            "history": lambda: flow_step(b.x, b.v, b.multistep, history=b.history),
            "sigma": lambda: clean_estimate(b.x, b.v, b.sigma),
        }.get(name, lambda: grpo_loss_and_grad(*b.steps, *b.scores, clip_range=CLIP, fanout=2))
        with pytest.raises(ValueError, match=f"^{name} has a tangent"):
            call()


def test_second_derivatives_are_errors():
    for name in ("flow_logprob", "grpo_loss"):
        v, u = leaves()
        first = torch.autograd.grad(FUNCTIONS[name](v, u).sum(), v, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no autograd formula"):
            first.sum().backward()


@pytest.mark.parametrize("field", [f.name for f in fields(StepCoefficients)])
def test_coefficients_that_require_a_gradient_are_errors(field):
    coef = replace(B.coef, **{field: getattr(B.coef, field).clone().requires_grad_()})
    calls = (
        lambda: flow_step(B.x, B.v, coef),
        lambda: flow_logprob(B.x, B.v, B.x_next, coef, fanout=2),
        lambda: grpo_loss(B.x, B.v, B.x_next, coef, *B.scores, clip_range=CLIP, fanout=2),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"coef.{field} requires grad, .*: pass coef.{field}.detach()"):
            call()
        with torch.no_grad():
            call()


def test_a_sigma_that_requires_a_gradient_is_an_error():
    sigma = B.sigma.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"sigma requires grad, .*: pass sigma.detach\(\)"):
        clean_estimate(B.x, B.v, sigma)


def test_of_what_the_op_itself_returns_only_the_loss_has_a_gradient():
    v, _ = leaves()
    arguments = checked_arguments(
        B.x, v, B.x_next, B.coef, *B.scores, 0.1, 2, None, "density", None, None, 0.0, None, 0.0, None, None
    )
    found = torch.ops.flowgrove.grpo_loss(*arguments)
    assert [t.requires_grad for t in found] == [True, False, False, False, False]
