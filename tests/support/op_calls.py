"""One batch of inputs for all ops, and all outputs and gradients that they give for it:
what the tests of layouts, bits and contexts compare.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor

from flowgrove_kernels import (
    NoiseKey,
    StepCoefficients,
    clean_estimate,
    flow_logprob,
    flow_step,
    grpo_loss,
    grpo_loss_and_grad,
    philox_normal,
    use_backend,
)
from kernel_cases import randn, stochastic_rows

GUIDANCE, CORRELATION, CLIP = 2.5, 1 / 17, (0.05, 0.1)
GPU_SIZES = (1, 63, 1031, 4096, 20_000, 129_600, 300_007)


@dataclass
class Batch:
    """B states, `fanout` steps from each."""

    x: Tensor  # [B, ...]
    v: Tensor  # [B, ...]
    v_uncond: Tensor  # [B, ...]
    v_ref: Tensor  # [B, ...]
    history: Tensor  # [B, ...]
    x_next: Tensor  # [E, ...]
    noise: Tensor  # [E, ...]
    coef: StepCoefficients
    multistep: StepCoefficients  # the same with prev_coef ≠ 0
    sigma: Tensor  # [B]
    node: Tensor  # [E]
    old_logp: Tensor  # [E]
    advantage: Tensor  # [E]
    weight: Tensor  # [E]
    fanout: int

    @property
    def key(self) -> NoiseKey:
        return NoiseKey(2**32 - 1, 5, 3, 2**31 + 7, self.node, self.node // self.fanout)

    @property
    def guidance(self) -> dict:
        return {"v_uncond": self.v_uncond, "guidance_scale": GUIDANCE}

    @property
    def steps(self) -> tuple:
        return self.x, self.v, self.x_next, self.coef

    @property
    def scores(self) -> tuple:
        return self.old_logp, self.advantage, self.weight

    def rows(self, index: Iterable[int]) -> "Batch":
        """The batch of these states and their steps."""
        parent = torch.tensor(list(index), dtype=torch.int64)
        edge = (parent.unsqueeze(1) * self.fanout + torch.arange(self.fanout)).flatten()
        of_edges = ("x_next", "noise", "node", "old_logp", "advantage", "weight")
        taken = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fanout"}
        return Batch(
            **{name: value[edge if name in of_edges else parent] for name, value in taken.items()}, fanout=self.fanout
        )

    def laid_out(self, layout: Callable[[Tensor], Tensor]) -> "Batch":
        """The same values in tensors [rows, ...] that `layout` makes."""
        names = ("x", "v", "v_uncond", "v_ref", "history", "x_next", "noise")
        return replace(self, **{name: layout(getattr(self, name)) for name in names})


def batch_of(batch: int, *shape: int, fanout: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Ratios of the batch fall on both sides of CLIP; `dtype` is that of the velocities."""
    edges, coef, multistep = batch * fanout, stochastic_rows(batch), stochastic_rows(batch)
    multistep.prev_coef.copy_(torch.linspace(-1, 1, batch))
    x, v, u, ref, history = (randn(batch, *shape, seed=seed + i) for i in range(5))
    noise, node = randn(edges, *shape, seed=seed + 5), torch.arange(edges)
    with use_backend("reference"):
        x_next, logp = flow_step(x, v + 0.1 * ref, coef, noise=noise, fanout=fanout)
    shift, advantage, weight = (randn(edges, seed=seed + i) for i in (6, 7, 8))
    velocities = (t.to(dtype) for t in (v, u, ref))
    sigma = torch.linspace(0.1, 1, batch)
    return Batch(
        x,
        *velocities,
        history,
        x_next,
        noise,
        coef,
        multistep,
        sigma,
        node,
        logp + 0.1 * shift,
        advantage,
        weight.abs(),
        fanout,
    )


def every_step(b: Batch) -> dict[str, Tensor]:
    """Outputs of the ops without a gradient."""
    found = {"noise": philox_normal(b.noise.shape, b.key), "estimate": clean_estimate(b.x, b.v, b.sigma, **b.guidance)}
    calls = {
        "mean": flow_step(b.x, b.v, b.coef, fanout=b.fanout),
        "drawn": flow_step(b.x, b.v, b.coef, key=b.key, fanout=b.fanout, sibling_correlation=CORRELATION),
        "given": flow_step(b.x, b.v, b.multistep, noise=b.noise, history=b.history, fanout=b.fanout, **b.guidance),
    }
    for name, (x_next, logp) in calls.items():
        found |= {f"{name} x_next": x_next, f"{name} logp": logp}
    return found


def every_loss(b: Batch, *, gradients: bool = True) -> dict[str, Tensor]:
    """Outputs of the ops with a gradient and, unless they are not wanted, the gradients."""
    v, u = (t.detach().requires_grad_(gradients) for t in (b.v, b.v_uncond))
    b = replace(b, v=v, v_uncond=u)
    noise, children = {"key": b.key, "sibling_correlation": CORRELATION}, {"fanout": b.fanout}
    logp = flow_logprob(*b.steps, **children, **b.guidance)
    density = grpo_loss(*b.steps, *b.scores, clip_range=CLIP, **children, **b.guidance, v_ref=b.v_ref, kl_weight=0.3)
    guard = grpo_loss(*b.steps, *b.scores, clip_range=CLIP, **children, ratio="guard", **noise)
    on_policy, grad, grad_uncond = grpo_loss_and_grad(
        *b.steps, None, *b.scores[1:], clip_range=CLIP, **children, **b.guidance
    )
    found = {"logp": logp, "on-policy grad v": grad, "on-policy grad v_uncond": grad_uncond}
    for name, out in {"density": density, "guard": guard, "on-policy": on_policy}.items():
        found |= {f"{name} {field}": value for field, value in zip(out._fields, out, strict=True)}
    if gradients:
        upstream = b.advantage  # any numbers [E]
        found["logp grad v"], found["logp grad v_uncond"] = torch.autograd.grad(logp, (v, u), upstream)
        found["density grad v"], found["density grad v_uncond"] = torch.autograd.grad(3 * density.loss, (v, u))
        found["guard grad v"] = torch.autograd.grad(guard.loss, v)[0]
    return {name: value.detach() for name, value in found.items()}


def every_op(b: Batch) -> dict[str, Tensor]:
    return every_step(b) | every_loss(b)


def rows_of(found: dict[str, Tensor], index: Iterable[int], fanout: int) -> dict[str, Tensor]:
    """What `every_op` would return for those rows of its batch; losses, which belong to a whole batch, are left out."""
    parent = torch.tensor(list(index), dtype=torch.int64)
    edge = (parent.unsqueeze(1) * fanout + torch.arange(fanout)).flatten()
    of_parents = {name for name in found if "grad" in name or name == "estimate"}
    return {name: value[parent if name in of_parents else edge] for name, value in found.items() if value.ndim > 0}


def different(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the results that are not the same bits; NaN is never the same."""
    return [name for name, value in expected.items() if not torch.equal(ours[name], value)]


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], part: float = 2e-5) -> None:
    """Two orders of fp32 arithmetic: `part` of a value and of the largest of its tensor. Half precision is one more
    rounding, which may go the other way: one unit in the last place, and between subnormal numbers the step from one to
    the next.
    """
    for name, value in expected.items():
        half = value.dtype in (torch.bfloat16, torch.float16)
        info = torch.finfo(value.dtype if half else torch.float32)
        rtol, step = (info.eps, info.smallest_normal * info.eps) if half else (part, 0.0)
        atol = part * value.float().abs().max().clamp_min(1e-6).item() + step
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(
            ours[name].float(), value.float(), rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def moved(value, device="cpu", dtype=None):
    """The same values elsewhere; floating-point tensors, but no coefficients and keys, in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: moved(item, device, dtype) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [moved(item, device, dtype) for item in value]
    return (
        type(value)(*(moved(getattr(value, f.name), device) for f in fields(value) if f.init))
        if is_dataclass(value)
        else value
    )
