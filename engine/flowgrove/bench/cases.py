"""What is measured: five pieces of work, each as the published loops do it and as every backend does it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowgrove.bench import published
from flowgrove.bench.check import Deviation, check_logprob, check_loss, check_step
from flowgrove.bench.inputs import Inputs
from flowgrove_kernels import flow_logprob, flow_step, grpo_loss, grpo_loss_and_grad

Outputs = tuple[Tensor, ...]
Run = Callable[[], Outputs]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]  # nothing, or torch.compile


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work: calls `run`, on that backend of ours where it has one."""

    name: str
    run: Run
    backend: str | None = None


@dataclass(frozen=True)
class Case:
    """`traffic`: bytes of the tensors that have to be read once and written once. `ours`:
    by what is added to the backend's name.
    """

    op: str
    name: str
    traffic: Callable[[Inputs], int]
    published: Callable[[Inputs, Wrap], Run]
    ours: dict[str, Callable[[Inputs], Run]]
    check: Callable[[Inputs, Outputs, Contender], list[Deviation]]


def contenders(case: Case, inputs: Inputs, names: tuple[str, ...]) -> list[Contender]:
    """Those that are named: eager, compiled, and backends."""
    made = []
    for name in names:
        if name == "eager":
            made.append(Contender(name, case.published(inputs, lambda function: function)))
        elif name == "compiled":
            made.append(Contender(name, case.published(inputs, partial(_compile, on_cpu=inputs.device.type == "cpu"))))
        else:
            made += [Contender(f"{name}{suffix}", build(inputs), name) for suffix, build in case.ours.items()]
    return made


def _compile(function: Callable[..., Any], *, on_cpu: bool) -> Callable[..., Any]:
    """At its fastest: static shapes, and on a CPU PyTorch's own random numbers (with Inductor's a step took 12 times as
    long on one core).

    There its kernels also name themselves to the profiler, which counts them.
    """
    options: dict[str, Any] | None = {"fallback_random": True, "cpp.enable_kernel_profile": True} if on_cpu else None
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def _trainable(inputs: Inputs) -> Tensor:
    return inputs.v.detach().requires_grad_()


def _published_step(inputs: Inputs, wrap: Wrap, *, given: bool) -> Run:
    step, i = wrap(published.sde_step), inputs
    if given:
        return lambda: step(i.x, i.v, i.sigma, i.sigma_next, i.noise)
    return lambda: step(i.x, i.v, i.sigma, i.sigma_next)


def _our_step(inputs: Inputs, *, given: bool) -> Run:
    i = inputs
    if given:
        return lambda: flow_step(i.x, i.v, i.coef, noise=i.noise)
    return lambda: flow_step(i.x, i.v, i.coef, key=i.key)


def _check_step(inputs: Inputs, outputs: Outputs, contender: Contender, *, given: bool) -> list[Deviation]:
    """The noise of a key is known; what the published code draws is not."""
    return check_step(inputs, outputs, inputs.noise if given or contender.backend else None)


def _published_logprob(inputs: Inputs, wrap: Wrap) -> Run:
    log_prob, i = wrap(published.log_prob), inputs
    return lambda: (log_prob(i.x, i.v, i.x_next, i.sigma, i.sigma_next),)


def _our_logprob(inputs: Inputs) -> Run:
    i = inputs
    return lambda: (flow_logprob(i.x, i.v, i.x_next, i.coef),)


def _published_logprob_backward(inputs: Inputs, wrap: Wrap) -> Run:
    log_prob, i, v = wrap(published.log_prob), inputs, _trainable(inputs)
    return lambda: _differentiated(log_prob(i.x, v, i.x_next, i.sigma, i.sigma_next), v, i.ones)


def _our_logprob_backward(inputs: Inputs) -> Run:
    i, v = inputs, _trainable(inputs)
    return lambda: _differentiated(flow_logprob(i.x, v, i.x_next, i.coef), v, i.ones)


def _published_loss(inputs: Inputs, wrap: Wrap) -> Run:
    loss, i, v = wrap(published.clipped_loss), inputs, _trainable(inputs)
    return lambda: _differentiated(loss(i.x, v, i.x_next, i.sigma, i.sigma_next, i.old_logp, i.advantage), v)


def _our_loss(inputs: Inputs) -> Run:
    i = inputs

    def run() -> Outputs:
        result, gradient, _ = grpo_loss_and_grad(
            i.x, i.v, i.x_next, i.coef, i.old_logp, i.advantage, i.weight, clip_range=published.CLIP_RANGE
        )
        return result.loss, gradient

    return run


def _our_loss_autograd(inputs: Inputs) -> Run:
    i, v = inputs, _trainable(inputs)
    return lambda: _differentiated(
        grpo_loss(i.x, v, i.x_next, i.coef, i.old_logp, i.advantage, i.weight, clip_range=published.CLIP_RANGE).loss, v
    )


def _differentiated(value: Tensor, v: Tensor, grad: Tensor | None = None) -> Outputs:
    return value.detach(), *torch.autograd.grad(value, v, grad)


def _bytes(inputs: Inputs, *, states: int, velocities: int, scores: int) -> int:
    """fp32 states, tensors in the dtype of v, and fp32 numbers per row."""
    return inputs.x.numel() * (4 * states + inputs.v.element_size() * velocities) + 4 * scores * inputs.x.shape[0]


CASES = (
    *(
        Case(
            "flow_step",
            name,
            partial(_bytes, states=2 + given, velocities=1, scores=6),  # x, x', (z); v; a, b, s, κ, log_norm, logp
            partial(_published_step, given=given),
            {"": partial(_our_step, given=given)},
            partial(_check_step, given=given),
        )
        for name, given in (("noise drawn", False), ("noise given", True))
    ),
    Case(
        "flow_logprob",
        "forward",
        partial(_bytes, states=2, velocities=1, scores=5),  # x, x'; v; a, b, κ, log_norm, logp
        _published_logprob,
        {"": _our_logprob},
        lambda inputs, outputs, _: check_logprob(inputs, outputs),
    ),
    Case(
        "flow_logprob",
        "forward+backward",
        partial(_bytes, states=2, velocities=2, scores=6),  # and the gradients of logp and v
        _published_logprob_backward,
        {"": _our_logprob_backward},
        lambda inputs, outputs, _: check_logprob(inputs, outputs),
    ),
    Case(
        "grpo_loss",
        "forward+backward",
        partial(_bytes, states=2, velocities=2, scores=7),  # a, b, κ, log_norm, old_logp, advantage, weight
        _published_loss,
        {"": _our_loss, " autograd": _our_loss_autograd},
        lambda inputs, outputs, _: check_loss(inputs, outputs),
    ),
)
