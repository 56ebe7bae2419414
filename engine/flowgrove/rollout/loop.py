"""The rollout: level by level, each in as few passes as the token budget allows,
every distinct state through the model once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrove.device import to_device
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.passes.out_of_memory import DROP_GRAPHS, FORGET_RECORDINGS, HALVE_PASSES, Shrink, retry_smaller
from flowgrove.passes.packing import Ints
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.rollout.denoise import Denoised, States, StepKind, denoise
from flowgrove.rollout.forest import Forest, RetainedPass
from flowgrove.rollout.retained_graphs import RetainedGraphs, first_update_states
from flowgrove.spans import span
from flowgrove_kernels import INITIAL_STEP, NoiseKey, StepCoefficients, philox_normal


@torch.no_grad()
def rollout(
    plan: RolloutPlan, coefficients: StepCoefficients, policy: Policy, prompts: Prompts, runner: PassRunner, *,
    seed: int, iteration: int, first_prompt: int = 0, share: bool = True, tuned_steps: int | None = None,
    retained: RetainedGraphs | None = None,
) -> Forest:  # fmt: skip
    """Runs the plan for `prompts`, of which the first is number `first_prompt` of the iteration, in passes of `runner`.
    `coefficients`: the plan's on the policy's device.

    `share` False runs every leaf's trajectory for itself, as the published loops do: the same forest, at their cost.
    `tuned_steps`: the steps that the trained model runs, the reference model those after them; None: all.
    `retained`: says which passes retain their graph; they are left in the forest's `retained`.
    Where the device's memory is too small, retained graphs are given up, then passes halved.
    """
    level = _Level(plan, coefficients, runner, policy, prompts, seed, iteration, first_prompt, retained)
    forest = Forest.allocate(plan, len(prompts), policy.adapter.latent_shape, policy.state_dtype, policy.device)
    x = level.initial_states(plan.roots if share else plan.leaves)
    logp: Tensor | None = None
    estimate: Tensor | None = None
    with ExitStack() as cheaper:
        for step in plan.steps:
            forest.keep(step.index, x, logp)
            own = (policy.cheap() if plan.cheap(step) else policy).of_expert(step.expert)
            if plan.cache is not None and plan.caches(step) and not runner.caches:
                cheaper.enter_context(runner.caching(own, plan.cache))
            reference = tuned_steps is not None and step.index >= tuned_steps
            fanout = step.fanout if share else 1
            with span(f"step {step.index}"), policy.reference() if reference else nullcontext(own) as found:
                model = found.of_expert(step.expert)
                # called before the next step
                done = retry_smaller(lambda: level.advance(model, step, x, estimate, fanout), level.shrink)  # noqa: B023
            x, logp, estimate = done.x_next, done.logp, done.estimate
            forest.retained += done.retained
    forest.keep(len(plan.steps), x, logp)
    forest.leaves = x
    return forest


@dataclass(frozen=True)
class _Advanced:
    x_next: Tensor
    logp: Tensor
    estimate: Tensor | None
    retained: list[RetainedPass]


@dataclass(frozen=True)
class _Level:
    """Takes the states of all prompts, in (prompt, lane) order, over one step.
    With sharing a lane is a node, without it a leaf.
    """

    plan: RolloutPlan
    coefficients: StepCoefficients
    runner: PassRunner
    policy: Policy
    prompts: Prompts
    seed: int
    iteration: int
    first_prompt: int
    retained: RetainedGraphs | None

    def initial_states(self, lanes: int) -> Tensor:
        """x_T [prompts · lanes, ...]; lanes of one root start alike."""
        prompt, node = self._prompts_and_nodes(lanes, self.plan.roots)
        key = NoiseKey(self.seed, self.iteration, INITIAL_STEP, self.first_prompt + prompt, node)
        return philox_normal((len(node), *self.policy.adapter.latent_shape), key).to(self.policy.state_dtype)

    def advance(self, policy: Policy, step: Step, x: Tensor, estimate: Tensor | None, fanout: int) -> _Advanced:
        """All passes of the step, of the policy itself or of its reference model."""
        kind = StepKind(fanout, self.plan.sibling_correlation if step.stochastic else 0.0, step.leaves_estimate)
        lanes = len(x) // len(self.prompts)
        prompt, node = self._prompts_and_nodes(lanes, step.nodes_in)
        child_prompt, child = (
            column.view(len(x), fanout) for column in self._prompts_and_nodes(lanes * fanout, step.nodes_out)
        )
        host_prompt = np.arange(len(x)) // lanes
        parts: list[tuple[slice | Tensor, Denoised]] = []
        passes = []
        prompts = self.prompts if self.plan.guided(step) else self.prompts.unguided()
        for number, (rows, retains) in enumerate(self._passes(step, prompts.tokens[host_prompt])):
            index = as_index(rows, x.device)
            key = None
            if step.stochastic:
                parents = node[index].repeat_interleave(fanout)
                key = NoiseKey(
                    self.seed,
                    self.iteration,
                    step.index,
                    self.first_prompt + child_prompt[index].flatten(),
                    child[index].flatten(),
                    parents,
                )
            sigma = torch.full((len(rows),), step.sigma, dtype=torch.float32, device=x.device)
            coef = self.coefficients[torch.full((len(rows),), step.index, device=x.device)]
            before = None if estimate is None else estimate[index]
            tokens = prompts.tokens_of(host_prompt[rows])
            states = States(x[index], sigma, prompt[index], coef, key, before, tokens)
            with self.runner.cache_name(f"{number} of {len(rows)} rows"):
                done = denoise(self.runner, policy, prompts, states, kind, host_prompt[rows], retains)
            parts.append((index, done))
            if retains and self.retained is not None:
                passes.append(RetainedPass(step.index, host_prompt[rows], rows % lanes, done.velocity))
                self.retained.passes.append(passes[-1])
        return _Advanced(
            _whole([(index, done.x_next) for index, done in parts], len(x), fanout),
            _whole([(index, done.logp) for index, done in parts], len(x), fanout),
            _whole([(index, done.estimate) for index, done in parts if done.estimate is not None], len(x), 1)
            if kind.estimates
            else None,
            passes,
        )

    @property
    def shrink(self) -> Shrink:
        """What can be given up where the memory is too small."""
        return Shrink({
            DROP_GRAPHS: lambda: self.retained is not None and self.retained.give_up(),
            FORGET_RECORDINGS: self.runner.forget,
            HALVE_PASSES: self.runner.budget.halve,
        })  # fmt: skip

    def _passes(self, step: Step, tokens: Ints) -> Iterator[tuple[Ints, bool]]:
        """The rows of every pass, and whether it retains its graph."""
        rest = np.arange(len(tokens))
        if self.retained is not None:
            numbers = range(self.first_prompt, self.first_prompt + len(self.prompts))
            trained = np.flatnonzero(first_update_states(self.plan, step, numbers).ravel())
            for rows in (trained[some] for some in self.runner.budget.passes(tokens[trained])):
                if self.retained.takes(len(rows)):
                    rest = np.setdiff1d(rest, rows, assume_unique=True)
                    yield rows, True
        for some in self.runner.budget.passes(tokens[rest]):
            yield rest[some], False

    def _prompts_and_nodes(self, lanes: int, nodes: int) -> tuple[Tensor, Tensor]:
        """(prompt, node) of every row of a level with `nodes` distinct states in `lanes` rows per prompt:
        int64 [prompts · lanes].
        """
        rows = torch.arange(len(self.prompts) * lanes, device=self.policy.device)
        return rows // lanes, rows % lanes // (lanes // nodes)


def as_index(rows: Ints, device: torch.device) -> slice | Tensor:
    """Row numbers as tensors are indexed: a slice if they follow each other, else int64 on the device,
    without a wait.
    """
    first, count = int(rows[0]), len(rows)
    if np.array_equal(rows, np.arange(first, first + count)):
        return slice(first, first + count)
    return to_device(torch.from_numpy(np.ascontiguousarray(rows)), device)


def _whole(parts: list[tuple[slice | Tensor, Tensor]], rows: int, fanout: int) -> Tensor:
    """The children of all rows, [rows · fanout, ...], from those of each pass."""
    first = parts[0][1]
    if len(parts) == 1 and isinstance(parts[0][0], slice):  # else the one pass takes the rows in another order
        return first
    whole = first.new_empty(rows, fanout, *first.shape[1:])
    for index, part in parts:
        whole[index] = part.view(-1, fanout, *first.shape[1:])
    return whole.flatten(0, 1)
