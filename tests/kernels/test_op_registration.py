"""The ops as PyTorch sees them: schemas, fake implementations, autograd, compilation, and no host syncs."""

import warnings
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
from flowgrove_kernels.backends import implementation
from flowgrove_kernels.noise import normals
from kernel_cases import randn, rollout

OPS = {
    "philox_normal",
    "clean_estimate",
    "flow_step",
    "flow_logprob",
    "flow_logprob_backward",
    "grpo_loss",
    "grpo_loss_and_grad",
}
CASE = rollout([2, 0, 3, 1], (3, 7), dtype=torch.float32)
TWINS = rollout([2, 2, 2], (21,), dtype=torch.float32)
KEY = NoiseKey(*(torch.full((6,), word) for word in (1, 2, 3, 4)), torch.arange(6), torch.arange(6) // 2)
SIGMA = torch.tensor([0.9, 0.7, 0.3])
U, REF = randn(3, 21, seed=41), randn(3, 21, seed=42)
V = TWINS.v
SCORES = (TWINS.old_logp, TWINS.advantage, TWINS.weight)


def loss_with(function, v, u, key):
    options = {
        "v_ref": REF,
        "kl_weight": 0.1,
        "v_uncond": u,
        "guidance_scale": 2.0,
        "ratio": "guard",
        "key": key,
        "sibling_correlation": 0.1,
    }
    return function(TWINS.x, v, TWINS.x_next, TWINS.coef, *SCORES, clip_range=(0.1, 0.2), fanout=2, **options)


FUNCTIONS = {  # of (v, v_uncond, key); each flattens to tensors
    "philox_normal": lambda v, u, key: philox_normal((6, 3, 7), key),
    "clean_estimate": lambda v, u, key: clean_estimate(TWINS.x, v, SIGMA, v_uncond=u, guidance_scale=2.0),
    "flow_step": lambda v, u, key: flow_step(
        TWINS.x, v, TWINS.coef, key=key, history=REF, fanout=2, sibling_correlation=0.1
    ),
    "flow_step guided": lambda v, u, key: flow_step(
        TWINS.x, v, TWINS.coef, noise=TWINS.noise, fanout=2, v_uncond=u, guidance_scale=2.0
    ),
    "flow_logprob": lambda v, u, key: flow_logprob(
        TWINS.x, v, TWINS.x_next, TWINS.coef, fanout=2, v_uncond=u, guidance_scale=2.0
    ),
    "flow_logprob uneven": lambda v, u, key: flow_logprob(CASE.x, CASE.v, CASE.x_next, CASE.coef, **CASE.children),
    "grpo_loss": lambda v, u, key: tuple(grpo_loss(*CASE.positional(), clip_range=0.01, **CASE.children)),
    "grpo_loss guard": lambda v, u, key: tuple(loss_with(grpo_loss, v, u, key)),
    "grpo_loss_and_grad": lambda v, u, key: tuple(
        grpo_loss_and_grad(*CASE.positional(), clip_range=0.01, **CASE.children)[0]
    ),
    "grpo_loss_and_grad guard": lambda v, u, key: (*(found := loss_with(grpo_loss_and_grad, v, u, key))[0], *found[1:]),
}


class Recorder(TorchDispatchMode):
    """Remembers the calls of flowgrove's ops and counts all others."""

    def __init__(self):
        super().__init__()
        self.calls, self.counts = [], Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flowgrove":
            self.calls.append((func, args))
        self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


def record(name):
    v, u = V.clone().requires_grad_(), U.clone().requires_grad_()
    with Recorder() as recorder:
        outputs = FUNCTIONS[name](v, u, KEY)
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        if first.requires_grad:
            first.sum().backward()
    return recorder


def recorded_calls():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = [(func, args, name) for name in FUNCTIONS for func, args in record(name).calls]
    return [
        pytest.param(func, args, id=f"{func._schema.name.removeprefix('flowgrove::')} in {name}")
        for func, args, name in calls
    ]


CALLS = recorded_calls()


def test_every_op_is_called_by_the_checks_below():
    registered = {
        name.removeprefix("flowgrove::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("flowgrove::")
    }
    assert registered >= OPS
    assert registered == {param.values[0]._schema.name.removeprefix("flowgrove::") for param in CALLS}


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_opcheck(op, args):
    differentiable = (
        {"v", "v_uncond"}
        if op._schema.name in ("flowgrove::clean_estimate", "flowgrove::flow_logprob", "flowgrove::grpo_loss")
        else ()
    )
    names = [argument.name for argument in op._schema.arguments]
    assert set(differentiable) <= set(names)
    copies = tuple(
        value.detach().clone().requires_grad_(name in differentiable) if isinstance(value, torch.Tensor) else value
        for name, value in zip(names, args, strict=False)
    )
    torch.library.opcheck(op, copies)


def test_opcheck_of_strided_inputs_and_no_edges():
    def wide(seed):
        return randn(3, 7, 6, seed=seed).transpose(1, 2)[:, ::2]

    x, v, x_next = wide(1), wide(2), wide(3)
    empty = torch.zeros(4, dtype=torch.int64)
    coef, scores = TWINS.coef, [t[:3] for t in SCORES]
    with Recorder() as recorder:
        flow_step(x, v, coef, noise=x_next)
        flow_logprob(x, v.requires_grad_(), x_next, coef).sum().backward()
        grpo_loss_and_grad(x, v, x_next, coef, *scores, clip_range=0.1)
        grpo_loss_and_grad(x, v, x_next[:0], coef, *(t[:0] for t in scores), clip_range=0.1, child_offsets=empty)
        clean_estimate(x, v, SIGMA)
    assert not x.is_contiguous()
    assert len(recorder.calls) == 6
    for op, args in recorder.calls:
        detached = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)
        torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions_equal_eager_ones(name, fresh_dynamo):
    run, compiled = FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        v, u = V.clone().requires_grad_(), U.clone().requires_grad_()
        outputs = function(v, u, KEY)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        if outputs[0].requires_grad:
            outputs[0].sum().backward()
        results.append([*outputs, v.grad, u.grad])
    assert len(results[0]) == len(results[1])
    for eager, ours in zip(*results, strict=True):
        assert (eager is None and ours is None) or torch.equal(eager, ours)


class EveryOp(torch.nn.Module):
    def forward(self, x, v, x_next, rows, key, scores):
        coef = StepCoefficients(*rows)
        guidance = {"v_uncond": v, "guidance_scale": 2.0}
        step = flow_step(x, v, coef, key=NoiseKey(1, 2, 3, 4, key), **guidance)
        loss = grpo_loss(x, v, x_next, coef, *scores, clip_range=0.1, v_ref=v, kl_weight=0.1)
        return *step, flow_logprob(x, v, x_next, coef, **guidance), *loss, clean_estimate(x, v, coef.std, **guidance)


@pytest.mark.parametrize("strict", [False, True])
def test_ops_export_for_batches_of_any_size(strict, fresh_dynamo):
    x, x_next = TWINS.x, TWINS.x_next[:3]
    inputs = x, V.detach(), x_next, TWINS.coef.tensors(), torch.arange(3), tuple(t[:3] for t in SCORES)
    batch = torch.export.Dim("batch", min=2)
    shapes = torch.utils._pytree.tree_map(lambda _: {0: batch}, inputs)
    exported = torch.export.export(EveryOp(), inputs, dynamic_shapes=shapes, strict=strict).module()
    twice = torch.utils._pytree.tree_map(lambda t: torch.cat([t, t]), inputs)
    for given in (inputs, twice):
        for ours, eager in zip(exported(*given), EveryOp()(*given), strict=True):
            assert torch.equal(ours, eager)


def test_the_recorder_sees_a_host_sync():
    with Recorder() as recorder:
        torch.ones(()).item()
    assert recorder.counts["aten::_local_scalar_dense"] == 1


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_value_goes_to_the_host(name):
    """Neither in the wrappers nor in the reference implementations,
    which are called here outside their ops so that nothing hides them.
    """
    recorder = record(name)
    assert recorder.calls
    assert recorder.counts["aten::_local_scalar_dense"] == 0
    for op, args in recorder.calls:
        short = op._schema.name.removeprefix("flowgrove::")
        reference = normals if short == "philox_normal" else implementation(short.removesuffix("_and_grad"), V)
        with Recorder() as inside:
            # one implementation serves the loss and its gradient
            reference(*([None] if short == "grpo_loss" else []), *args)
        assert sum(inside.counts.values()) > 3
        assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"} & set(inside.counts)
