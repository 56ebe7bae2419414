"""What a row costs in passes of a run's own model, and from it what an iteration costs."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowgrove.device import release_memory, to_device
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.rollout.denoise import States, StepKind, denoise
from flowgrove.setup import Setup
from flowgrove.spans import Totals
from flowgrove_kernels import step_coefficients

NEAR = 0.03  # of the best: what differs less is taken for equally fast
Key = TypeVar("Key")


class Timed(NamedTuple):
    """Seconds per row of a pass: of the rollout, and of training (forward and backward)."""

    forward: float
    train: float


class Work(NamedTuple):
    """Rows that iteration 0 of a recipe runs through the transformer, all prompts: in the rollout, in training, and the
    most that stand beside each other.
    """

    forwards: int
    passes: int
    widest: int

    @classmethod
    def of(cls, setup: Setup) -> "Work":
        """Raises UserError for a plan that cannot be made."""
        counts, prompts = setup.first_plan.counts, setup.recipe.data.prompts_per_iteration
        forwards, passes = counts.rollout_forwards, counts.train_passes
        if not setup.recipe.engine.share:
            forwards, passes = counts.unshared_rollout_forwards, counts.unshared_train_passes
        return cls(prompts * forwards, prompts * passes, prompts * counts.leaves)

    def seconds(self, row: Timed) -> float:
        """Predicted, of an iteration's passes."""
        return self.forwards * row.forward + self.passes * row.train


def first_near_best(seconds: Mapping[Key, float]) -> Key:
    """The first of those that take at most NEAR longer than the fastest."""
    best = min(seconds.values())
    return next(key for key, spent in seconds.items() if spent <= (1 + NEAR) * best)


class Passes:
    """Passes of a policy's transformer on rows of the longest prompt, states and embeddings drawn at random. `tokens`:
    what a row costs, with guidance both of its rows. `lengths`: of the rows' texts, where a policy splits them; with
    guidance the unconditional ones have others.
    """

    def __init__(self, policy: Policy, runner: PassRunner, lengths: int = 1) -> None:
        self.policy, self.runner, self.device = policy, runner, policy.device
        self._draw = torch.Generator(policy.device).manual_seed(0)
        blank = policy.blank_prompt()
        self.tokens = int(blank.tokens[0])
        uncond = None if blank.uncond is None else self._drawn(blank.uncond)
        self.prompts = replace(blank, cond=self._drawn(blank.cond), uncond=uncond)
        if policy.splits_lengths:
            self.prompts = _of_lengths(self.prompts, lengths)

    def states(self, rows: int) -> Tensor:
        """States [rows, ...] drawn at random."""
        return self._normal((rows, *self.policy.adapter.latent_shape), self.policy.state_dtype)

    def velocity(self, x: Tensor) -> Tensor:
        """The velocity of states [B, ...]."""
        sigma = torch.full((len(x),), 0.5, device=self.device)
        kinds = len(self.prompts)
        on_host, prompt = np.arange(len(x)) % kinds, torch.arange(len(x), device=self.device) % kinds
        return self.runner.velocity(self.policy, x, sigma, self.prompts, prompt, on_host).v

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        """A pass of the rollout."""
        self.velocity(x)

    def roll(self, runner: PassRunner, x: Tensor) -> None:
        """A pass of the rollout with its step, replayed where `runner` records."""
        rows = len(x)
        half, less = (torch.full((rows,), sigma, dtype=torch.float64) for sigma in (0.5, 0.4))
        coef = step_coefficients("ode", half, less).to(self.device, non_blocking=True)
        prompt = torch.zeros(rows, dtype=torch.int64, device=self.device)
        states = States(x, to_device(half.float(), self.device), prompt, coef, None, None)
        first = np.zeros(rows, dtype=np.int64)
        denoise(runner, self.policy, self.prompts, states, StepKind(1, 0.0, False), first)

    def train(self, x: Tensor) -> None:
        """A training pass. Gradients are left behind."""
        v = self.velocity(x)
        v.backward(torch.ones_like(v))

    def timed(self, rows: int, repeats: int = 1) -> Timed:
        """Medians, after a pass of each kind that is not timed."""
        return Timed(self.seconds_per_row(self.forward, rows, repeats), self.seconds_per_row(self.train, rows, repeats))

    def seconds_per_row(self, run: Callable[[Tensor], object], rows: int, repeats: int = 1) -> float:
        """The median of `run` on `rows` states, after one call that is not timed."""
        x = self.states(rows)
        run(x)
        return statistics.median(self._seconds(run, x) for _ in range(repeats)) / rows

    def release(self) -> None:
        """Gives gradients and, on a GPU, what a failed pass and the allocator hold back."""
        self.policy.weights.drop_gradients()
        if self.device.type == "cuda":
            release_memory(self.device)

    def _seconds(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        totals = Totals(self.device)
        with totals("pass"):
            run(x)
        return totals.seconds["pass"]

    def _drawn(self, blank: Conditioning) -> Conditioning:
        drawn = blank.tensors.items()
        return Conditioning({name: self._normal(t.shape, t.dtype) if t.is_floating_point() else t for name, t in drawn})

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._draw)


def _of_lengths(one: Prompts, count: int) -> Prompts:
    """Prompts like `one`, each with masked sequences a token shorter than the one before, and unconditional ones that
    are shorter than all of them.
    """
    if one.masked_lengths is None:
        raise ValueError("these prompts are for a policy that does not split lengths")
    row = torch.zeros(count, dtype=torch.int64, device=next(iter(one.cond.tensors.values())).device)
    lengths = one.masked_lengths - np.arange(count)[:, None]
    if one.uncond is not None:
        lengths[:, lengths.shape[1] // 2 :] -= count
    return Prompts(
        one.texts * count, one.cond[row], one.uncond, None if one.uncond is None else row,
        one.lengths.repeat(count), one.tokens.repeat(count), np.maximum(lengths, 1),
    )  # fmt: skip
