"""One pass of a denoising step: the velocity of some states of one timestep, and the step that it drives. All it takes are tensors on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrove.models.policy import Policy, Prompts, Velocity
from flowgrove.spans import span
from flowgrove_kernels import NoiseKey, StepCoefficients, clean_estimate, flow_step


@dataclass(frozen=True)
class States:
    """R states before a step: x [R, ...], sigma fp32 [R], prompt [R], coefficient rows [R], the noise key of their R·fanout children (None: no noise), and
    the clean estimate of the step before [R, ...] where the solver takes one."""

    x: Tensor
    sigma: Tensor
    prompt: Tensor
    coef: StepCoefficients
    key: NoiseKey | None
    history: Tensor | None


@dataclass(frozen=True)
class StepKind:
    """What is the same for every pass of a step: fanout, correlation of siblings' noise, whether the next step takes this one's clean estimate."""

    fanout: int
    sibling_correlation: float
    estimates: bool


@dataclass(frozen=True)
class Denoised:
    """x_next [R·fanout, ...], logp [R·fanout], the clean estimate [R, ...] if the next step takes it, and the velocity, with its graph where one was made."""

    x_next: Tensor
    logp: Tensor
    estimate: Tensor | None
    velocity: Velocity


def denoise(policy: Policy, prompts: Prompts, states: States, kind: StepKind, longest: int, with_graph: bool = False) -> Denoised:
    """`longest`: tokens of the pass's longest text; `with_graph`: the velocity can be differentiated."""
    with span("transformer"), torch.set_grad_enabled(with_graph):
        velocity = policy.velocity(states.x, states.sigma, prompts, states.prompt, longest)
    v, uncond = velocity.v.detach(), None if velocity.uncond is None else velocity.uncond.detach()
    with span("flow_step"), torch.no_grad():
        x_next, logp = flow_step(
            states.x, v, states.coef, key=states.key, history=states.history, fanout=kind.fanout,
            sibling_correlation=kind.sibling_correlation, v_uncond=uncond, guidance_scale=velocity.scale,
        )  # fmt: skip
        estimate = clean_estimate(states.x, v, states.sigma, v_uncond=uncond, guidance_scale=velocity.scale) if kind.estimates else None
    return Denoised(x_next, logp, estimate, velocity)
