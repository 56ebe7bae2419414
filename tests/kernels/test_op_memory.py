"""The fused ops allocate their outputs and no more,
and inputs spread over 2³¹ elements by stride 0 are read where they lie.
"""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from flowgrove_kernels import (
    StepCoefficients,
    available_backends,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
    use_backend,
)
from kernel_cases import randn, stochastic_rows
from op_calls import CLIP, Batch, batch_of

KB = 1024
ROWS, ELEMENTS = 16, 129_600
MANY = 70_000  # · 32,768 elements > 2³¹


@pytest.fixture
def cpu_backend():
    if "cpu" not in available_backends():
        pytest.skip('the "cpu" backend is not compiled here')
    with use_backend("cpu"):
        yield


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(ROWS, ELEMENTS, fanout=1, dtype=torch.bfloat16)


def measured(function):
    """(most bytes that torch held on the CPU at once for a call, beyond what it held before; bytes of what the
    call returns; what it returns).
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    peak = max(accumulate((size for _, size in events), initial=0))
    return peak, sum(t.numel() * t.itemsize for t in tree_leaves(kept) if isinstance(t, torch.Tensor)), kept


CALLS = {
    "philox_normal": lambda b: philox_normal(b.noise.shape, b.key),
    "clean_estimate": lambda b: clean_estimate(b.x, b.v, b.sigma, **b.guidance),
    "flow_step drawn": lambda b: flow_step(b.x, b.v, b.coef, key=b.key),
    "flow_step siblings": lambda b: flow_step(
        b.x[::2], b.v[::2], b.coef[::2], key=b.key, fanout=2, sibling_correlation=0.1
    ),
    "flow_step given": lambda b: flow_step(b.x, b.v, b.multistep, noise=b.noise, history=b.history, **b.guidance),
    "flow_logprob": lambda b: flow_logprob(*b.steps, **b.guidance),
    "grpo_loss": lambda b: grpo_loss(*b.steps, *b.scores, clip_range=CLIP, v_ref=b.v_ref, kl_weight=0.1),
    "grpo_loss_and_grad": lambda b: grpo_loss_and_grad(*b.steps, *b.scores, clip_range=CLIP),
    "grpo_loss_and_grad guided": lambda b: grpo_loss_and_grad(
        *b.steps, *b.scores, clip_range=CLIP, v_ref=b.v_ref, kl_weight=0.1, **b.guidance
    ),
    "grpo_loss_and_grad guard": lambda b: grpo_loss_and_grad(
        *b.steps, *b.scores, clip_range=CLIP, ratio="guard", key=b.key
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_allocates_its_outputs_only(call, batch, cpu_backend):
    peak, outputs, _ = measured(lambda: call(batch))
    assert outputs <= peak < outputs + 64 * KB


def test_the_backward_of_flow_logprob_allocates_its_gradients_only(batch, cpu_backend):
    v, u = batch.v.clone().requires_grad_(), batch.v_uncond.clone().requires_grad_()
    logp = flow_logprob(batch.x, v, *batch.steps[2:], v_uncond=u, guidance_scale=2.0)
    peak, outputs, _ = measured(lambda: torch.autograd.grad(logp, (v, u), batch.advantage))
    assert outputs == 2 * ROWS * ELEMENTS * 2
    assert outputs <= peak < outputs + 64 * KB


LAYOUTS = {
    "every second row": lambda t: t[::2],
    "one row for all": lambda t: t[:1].expand(8, -1),
    "rows of wider rows, unaligned": lambda t: t[:8, 1:-3],
    "unaligned": lambda t: t.flatten()[1 : 8 * 1000 + 1].view(8, 1000),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_read_where_they_lie(layout, batch, cpu_backend):
    """No copy is made of rows at any distance from each other, or at any address."""
    x, v, noise = (layout(t) for t in (batch.x, batch.v, batch.noise))
    peak, outputs, _ = measured(lambda: flow_step(x, v, batch.coef[:8], noise=noise))
    assert outputs <= peak < outputs + 8 * KB


def test_the_measurement_sees_a_temporary(batch):
    """A tensor that is kept, one that is not, and what the reference needs in between."""
    size = batch.x.numel() * 4
    for call, tensors in (
        (lambda: batch.x + 1, 1),
        (lambda: (batch.x + 1)[:1] * 2, 1),
        (lambda: ((batch.x + 1) * 2, batch.x - 1), 2),
    ):
        peak, _, _ = measured(call)
        assert 0 <= peak - tensors * size < size // 8
    with use_backend("reference"):
        peak, outputs, _ = measured(lambda: flow_step(batch.x, batch.v, batch.coef, noise=batch.noise))
    assert peak > outputs + 2 * size


def spread(one, many):
    return (
        StepCoefficients(*(column.expand(many) for column in one.tensors()))
        if isinstance(one, StepCoefficients)
        else one.expand(many, -1)
    )


@pytest.fixture
def states():
    """x, v, x_next [1, 32,768] and their row of coefficients."""
    return (*(randn(1, 32_768, seed=i) for i in range(3)), stochastic_rows(1))


@pytest.mark.parametrize("function", [flow_logprob, grpo_loss])
def test_logp_of_more_than_2_31_elements(function, states, cpu_backend):
    """70,000 equal rows, which would be 9 GB, have the logp of one."""
    many, ones = [spread(one, MANY) for one in states], torch.ones(MANY)
    scores, options = ((), {}) if function is flow_logprob else ((ones, ones, ones), {"clip_range": CLIP})
    assert many[0].numel() > 2**31
    peak, outputs, found = measured(lambda: function(*many, *scores, **options))
    logp = found if function is flow_logprob else found.logp
    assert torch.equal(logp, flow_logprob(*states).expand(MANY))
    assert peak < outputs + 4 * MANY * 10  # coefficients, written out


def test_gradients_of_more_than_2_31_elements(states, cpu_backend):
    """70,000 equal children of one row: 70,000 times the gradient of one, summed in fp32."""
    x, v, x_next, coef = states
    ones = torch.ones(MANY)
    arguments = (x, v, spread(x_next, MANY), coef, None, ones, ones)
    peak, outputs, (out, grad, _) = measured(lambda: grpo_loss_and_grad(*arguments, clip_range=CLIP, fanout=MANY))
    _, one, _ = grpo_loss_and_grad(*states, None, ones[:1], ones[:1], clip_range=CLIP)
    assert torch.equal(out.logp, flow_logprob(*states).expand(MANY))
    torch.testing.assert_close(grad, MANY * one, rtol=5e-3, atol=0)
    assert peak < outputs + 64 * KB


@pytest.mark.parametrize("fanout", [1, 2])
def test_a_step_from_rows_of_stride_zero(fanout, states, cpu_backend):
    """Equal states with noise of their own, which only the outputs hold."""
    x, v, _, coef = states
    many = [spread(one, 5) for one in (x, v, coef)]
    noise = randn(5 * fanout, 32_768, seed=7)
    peak, outputs, (x_next, logp) = measured(lambda: flow_step(*many, noise=noise, fanout=fanout))
    copies = flow_step(x.repeat(5, 1), v.repeat(5, 1), coef[[0] * 5], noise=noise, fanout=fanout)
    assert torch.equal(x_next, copies[0])
    assert torch.equal(logp, copies[1])
    assert peak < outputs + 8 * KB
