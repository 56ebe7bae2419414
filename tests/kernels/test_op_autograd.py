"""What autograd may do to the ops: checkpoint them, keep their inputs elsewhere, differentiate only what they say."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from compat_cases import SIGMAS
from flowgrove_kernels import clean_estimate, flow_logprob, grpo_loss
from flowgrove_kernels.compat.dance_grpo import flux_step
from flowgrove_kernels.compat.mix_grpo import flow_grpo_step
from kernel_backends import AND_EMULATED
from op_calls import CLIP, batch_of

pytestmark = AND_EMULATED

B = batch_of(4, 3, 21)
FUNCTIONS = {  # of (v, v_uncond)
    "clean_estimate": lambda v, u: clean_estimate(B.x, v, B.sigma, v_uncond=u, guidance_scale=2.0),
    "flow_logprob": lambda v, u: flow_logprob(B.x, v, B.x_next, B.coef, fanout=2, v_uncond=u, guidance_scale=2.0),
    "grpo_loss": lambda v, u: grpo_loss(
        B.x, v, B.x_next, B.coef, *B.scores, clip_range=CLIP, fanout=2, v_uncond=u, guidance_scale=2.0
    ).loss,
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
