"""One pass of a denoising step: the velocity of some states of one timestep, and the step that it drives.
All it takes are tensors on the device.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from flowgrove.models.conditioning import Conditioning, padded_length
from flowgrove.models.policy import Policy, Velocity
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.passes.packing import Ints
from flowgrove.passes.recordings import Tensors
from flowgrove.spans import OPS, TRANSFORMER, span, untimed
from flowgrove_kernels import NoiseKey, StepCoefficients, clean_estimate, flow_step


@dataclass(frozen=True)
class States:
    """R states before a step: x [R, ...], sigma fp32 [R], prompt [R], coefficient rows [R], the noise key of their
    R·fanout children (None: no noise), and the clean estimate of the step before [R, ...] where the solver takes one.
    `tokens` that they cost a pass, counted on the host; 0: not counted.
    """

    x: Tensor
    sigma: Tensor
    prompt: Tensor
    coef: StepCoefficients
    key: NoiseKey | None
    history: Tensor | None
    tokens: int = 0


@dataclass(frozen=True)
class StepKind:
    """What is the same for every pass of a step: fanout, correlation of siblings' noise,
    whether the next step takes this one's clean estimate.
    """

    fanout: int
    sibling_correlation: float
    estimates: bool


@dataclass(frozen=True)
class Denoised:
    """x_next [R·fanout, ...], logp [R·fanout], the clean estimate [R, ...] if the next step takes it, and the velocity
    where it can be differentiated.
    """

    x_next: Tensor
    logp: Tensor
    estimate: Tensor | None
    velocity: Velocity | None


def denoise(
    runner: PassRunner, policy: Policy, prompts: Prompts, states: States, kind: StepKind, on_host: Ints,
    differentiable: bool = False,
) -> Denoised:  # fmt: skip
    """One pass; `on_host`: the prompts of its states there."""
    if differentiable or not runner.records:
        return _denoise(runner, policy, prompts, states, kind, on_host, differentiable)
    with span("transformer", TRANSFORMER, len(states.x), states.tokens):
        return _replay(runner, policy, prompts, states, kind, on_host)


def _replay(
    runner: PassRunner, policy: Policy, prompts: Prompts, states: States, kind: StepKind, on_host: Ints
) -> Denoised:
    """The same from a recording: σ, coefficients, noise key and embeddings go in as tensors,
    so that one serves every timestep and prompt.
    """
    longest = prompts.longest(on_host)
    rows, cond = len(states.x), prompts.cond[states.prompt].trimmed(longest)
    names, uncond = list(cond.tensors), prompts.uncond
    if uncond is not None and len(uncond) > 1:  # else one row serves all
        uncond = prompts.uncond_rows(states.prompt)
    key = None if states.key is None else states.key.pack(rows * kind.fanout, states.x.device)

    def function(x: Tensor, sigma: Tensor, key: Tensor | None, history: Tensor | None, *rest: Tensor) -> Tensors:
        mine = Conditioning(dict(zip(names, rest[6:], strict=False)))
        other = None if uncond is None else Conditioning(dict(zip(names, rest[6 + len(names) :], strict=True)))
        row = torch.arange(rows, device=x.device)
        other_of = None if other is None else row if len(other) > 1 else torch.zeros_like(row)
        alone = Prompts([], mine, other, other_of, prompts.lengths[on_host], prompts.tokens[on_host])
        noise = None if key is None else NoiseKey.of_packed(key)
        with untimed(), span("recording"):
            states = States(x, sigma, row, StepCoefficients(*rest[:6]), noise, history)
            done = _denoise(runner, policy, alone, states, kind, np.arange(rows), False)
        return done.x_next, done.logp, done.estimate

    inputs = [
        states.x,
        states.sigma,
        key,
        states.history,
        *states.coef.tensors(),
        *cond.tensors.values(),
        *(uncond.tensors.values() if uncond else ()),
    ]
    x_next, logp, estimate = cast(
        tuple[Tensor, Tensor, Tensor | None],
        runner.replay(policy, (kind, padded_length(longest)), function, inputs),
    )
    return Denoised(x_next, logp, estimate, None)


def _denoise(
    runner: PassRunner, policy: Policy, prompts: Prompts, states: States, kind: StepKind, on_host: Ints,
    differentiable: bool,
) -> Denoised:  # fmt: skip
    rows = len(states.x)
    with span("transformer", TRANSFORMER, rows, states.tokens), torch.set_grad_enabled(differentiable):
        velocity = runner.velocity(policy, states.x, states.sigma, prompts, states.prompt, on_host)
    v, uncond = velocity.v.detach(), None if velocity.uncond is None else velocity.uncond.detach()
    with span("flow_step", OPS, rows), torch.no_grad():
        x_next, logp = flow_step(
            states.x, v, states.coef, key=states.key, history=states.history, fanout=kind.fanout,
            sibling_correlation=kind.sibling_correlation, v_uncond=uncond, guidance_scale=velocity.scale,
        )  # fmt: skip
        estimate = (
            clean_estimate(states.x, v, states.sigma, v_uncond=uncond, guidance_scale=velocity.scale)
            if kind.estimates
            else None
        )
    return Denoised(x_next, logp, estimate, velocity if differentiable else None)
