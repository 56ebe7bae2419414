"""What the compatible steps share: checks in the trainers' words, dtypes, noise, one step sampled or scored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowgrove_kernels.arguments import check_tensor, number, wrong
from flowgrove_kernels.clean_estimate import clean_estimate
from flowgrove_kernels.coefficients import StepCoefficients
from flowgrove_kernels.flow_logprob import flow_logprob
from flowgrove_kernels.flow_step import flow_step
from flowgrove_kernels.noise import NoiseKey

Generators = torch.Generator | Sequence[torch.Generator] | None


def check(model_output: Tensor, sample: Tensor, prev_sample: Tensor | None, *, name: str) -> None:
    """Raises ValueError unless the three are floating-point [B, ...] of one shape on one device.

    `name`: what the trainer calls `sample`.
    """
    check_tensor(sample, name)
    check_tensor(model_output, "model_output")
    if sample.ndim < 2 or not sample.is_floating_point():
        wrong(name, sample, "pass floating-point [B, ...] with at least two dimensions")
    for value, argument in ((model_output, "model_output"), (prev_sample, "prev_sample")):
        if value is None:
            continue
        check_tensor(value, argument)
        if value.shape != sample.shape or value.device != sample.device or not value.is_floating_point():
            wanted = f"pass floating-point {list(sample.shape)} on {sample.device}, like {name}"
            wrong(argument, value, wanted, place=True)
    if sample.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad: pass {name}.detach(), only model_output is differentiated")


def check_noise(prev_sample: Tensor | None, generator: Generators, key: NoiseKey | None) -> None:
    """Raises ValueError for two ways to say what the next sample is."""
    ways = {"key": key, "generator": generator, "prev_sample": prev_sample}
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} both say what the next sample is: pass one")
    listed = generator if isinstance(generator, list | tuple) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in listed):
        wrong("generator", generator, "pass a torch.Generator, or a list of them")


def check_level(value: float, name: str) -> float:
    """A noise level as a float, also of a tensor [] on the CPU; `name`: what the trainer calls it."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
        value = value.item()
    return number(value, name, "write a number >= 0", 0)


def computed(sample: Tensor, result: torch.dtype) -> Tensor:
    """`sample` as the ops take it: float64 where `result` is, else fp32."""
    return sample.detach().to(torch.float64 if result == torch.float64 else torch.float32)


def drawn(shape: torch.Size, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normals as diffusers draws them: on the generator's device, then moved. A list holds one for each sample.

    Raises ValueError for a list of another length, or a generator of an accelerator for tensors elsewhere.
    """
    if not isinstance(generator, torch.Generator | None):
        if len(generator) == 1:
            return drawn(shape, generator[0], device, dtype)
        if len(generator) != shape[0]:
            raise ValueError(f"generator lists {len(generator)}: pass one, or one for each of the {shape[0]} samples")
        return torch.cat([drawn(torch.Size((1, *shape[1:])), one, device, dtype) for one in generator])
    source = device if generator is None else generator.device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"generator is on {source}: make it on {device} or on the CPU")
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)


def step(
    x: Tensor,
    v: Tensor,
    coef: StepCoefficients,
    result: torch.dtype,
    *,
    noise: Tensor | None = None,
    key: NoiseKey | None = None,
    prev_sample: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_next [B, ...], logp [B] in the dtype of x, differentiable in v).

    Scores `prev_sample`; or samples with `noise` (any floating-point dtype) or `key`, or takes the mean, in `result`.
    logp is that of the x_next returned, rounded as it is, so scoring that x_next finds the same bits.
    """
    if prev_sample is not None:
        return prev_sample, flow_logprob(x, v, prev_sample.to(x.dtype), coef)
    x_next, logp = flow_step(x, v, coef, noise=None if noise is None else noise.to(x.dtype), key=key)
    if result == x.dtype and not differentiated(v):
        return x_next, logp
    x_next = x_next.to(result)
    return x_next, flow_logprob(x, v, x_next.to(x.dtype), coef)


def step_mean(x: Tensor, v: Tensor, coef: StepCoefficients) -> Tensor:
    """μ = a·x + b·v in the dtype of x, differentiable in v; the bits of the mean inside `step`."""
    if not differentiated(v):
        return flow_step(x, v, coef)[0]
    return clean_estimate(column(coef.x_coef, x) * x, v, -coef.v_coef)


def differentiated(v: Tensor) -> bool:
    return v.requires_grad and torch.is_grad_enabled()


def handed_out(values: Tensor, like: Tensor) -> Tensor:
    """`column` in memory of its own: whoever writes to it does not write to a table."""
    return column(values, like).clone()


def column(values: Tensor, like: Tensor) -> Tensor:
    """[n] → [n, 1, ...], with as many dimensions as `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
