"""The passes of an iteration's updates: which rows train together,
and again in smaller passes where the device's memory is too small.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgrove.credit import EdgeCredit
from flowgrove.models.policy import Policy, Velocity
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.passes.out_of_memory import DROP_GRAPHS, FORGET_RECORDINGS, HALVE_PASSES, Shrink
from flowgrove.passes.packing import Ints
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Recipe
from flowgrove.rollout.forest import Forest, RetainedPass
from flowgrove.rollout.loop import as_index
from flowgrove.spans import OPS, TRANSFORMER, span
from flowgrove.update.edges import Edges, UpdateSize, edges_of_update, update_sizes
from flowgrove.update.micro_batches import MicroBatch, micro_batches
from flowgrove_kernels import StepCoefficients, flow_logprob
from flowgrove_kernels.affine import guided


class _KeptVelocities:
    """`of` [R, ...]: the reference model's guided velocity of every state of a forest that is `known` on the host. R
    leaves out the last level, where no trained step begins.
    """

    def __init__(self, forest: Forest) -> None:
        rows = max(forest.first_row.values())
        self.of = torch.empty_like(forest.states[:rows])
        self.known = np.zeros(rows, dtype=bool)


@dataclass
class Rolled:
    """What an update trains on: prompts of one size after their rollout. `coefficients`: the plan's on the device;
    `first_prompt`: the first one's number in the iteration.
    """

    policy: Policy
    forest: Forest
    prompts: Prompts
    credit: dict[int, EdgeCredit]
    coefficients: StepCoefficients
    first_prompt: int = 0
    _kept: _KeptVelocities | None = field(default=None, init=False)

    @torch.no_grad()
    def reference_velocity(self, runner: PassRunner, batch: MicroBatch, keep: bool) -> Tensor:
        """The reference model's guided velocity [B, ...] of the rows of a pass, in the states' dtype: of the same rows
        in the same pass, or with `keep` of those of them that no pass has had before.
        """
        if not keep:
            return self._reference(runner, batch, np.arange(len(batch)))
        if self._kept is None:
            self._kept = _KeptVelocities(self.forest)
        kept, new = self._kept, np.flatnonzero(~self._kept.known[batch.states])
        if len(new):
            rows = as_index(new, batch.state.device)
            kept.of[batch.state[rows]] = self._reference(runner, batch, new)
            kept.known[batch.states[new]] = True
        return kept.of[batch.state]

    def _reference(self, runner: PassRunner, batch: MicroBatch, some: Ints) -> Tensor:
        with self.policy.reference() as reference:
            v, uncond, scale = self._velocity(runner, reference, batch, some, "reference")
        return guided(v, uncond, scale or 1.0, self.policy.state_dtype)

    def velocity(self, runner: PassRunner, batch: MicroBatch) -> Velocity:
        """The velocity of a pass; the rollout's own where its graph was retained."""
        if batch.velocity is not None:
            return batch.velocity
        return self._velocity(runner, self.policy, batch, np.arange(len(batch)), "transformer")

    def tokens_of(self, batch: MicroBatch) -> int:
        """Tokens of a pass."""
        return self.prompts.tokens_of(batch.prompts)

    def _velocity(self, runner: PassRunner, policy: Policy, batch: MicroBatch, some: Ints, name: str) -> Velocity:
        """That of `some` rows of a pass, in one pass."""
        prompts, rows = batch.prompts[some], as_index(some, batch.state.device)
        with span(name, TRANSFORMER, len(some), self.prompts.tokens_of(prompts)):
            return runner.velocity(
                policy.of_expert(batch.expert),
                self.forest.states[batch.state[rows]],
                batch.sigma[rows],
                self.prompts,
                batch.prompt[rows],
                prompts,
            )


class Whole(NamedTuple):
    """What the updates of an iteration are of all its prompts, on whichever rank: the plan and every update's size."""

    plan: RolloutPlan
    sizes: list[UpdateSize]

    @classmethod
    def of_credit(cls, recipe: Recipe, plan: RolloutPlan, credit: dict[int, EdgeCredit]) -> "Whole":
        """The sizes that the credit of all prompts gives; the plans of several picture sizes differ in σ alone."""
        return cls(plan, update_sizes(plan, credit, recipe.update.kl_weight > 0))

    @classmethod
    def of(cls, recipe: Recipe, parts: list[Rolled]) -> "Whole":
        """The sizes of these parts together."""
        alone = [cls.of_credit(recipe, part.forest.plan, part.credit).sizes for part in parts]
        sizes = [
            UpdateSize(sum(s.selected for s in each), any(s.trains for s in each)) for each in zip(*alone, strict=True)
        ]
        return cls(parts[0].forest.plan, sizes)


class UpdatePasses:
    """`batches[u]`: the passes of update u, each with what it is a pass of. `selected`: the edges of every update, N_u,
    by which its loss is divided.
    """

    def __init__(self, recipe: Recipe, parts: list[Rolled], runner: PassRunner, selected: list[int]) -> None:
        self.parts, self.runner, self.budget, self.selected = parts, runner, runner.budget, selected
        update, engine = recipe.update, recipe.engine
        self.updates = len(selected)
        self.replays = engine.exact_replay and engine.share
        noisy = any(part.policy.compute_dtype == torch.bfloat16 for part in parts)
        # guard needs no logp, replay has it
        self.refreshes_logp = noisy and engine.share and not self.replays and update.step_weight != "guard"
        weights = [step_weights(part.forest.plan, update.step_weight) for part in parts]
        self.edges: list[list[Edges]] = []  # of every update and part
        for number in range(self.updates):
            self.edges.append([])
            for part, weight in zip(parts, weights, strict=True):
                granularity = (
                    "edges"
                    if not engine.share
                    else "levels"
                    if self.replays or (number == 0 and part.forest.retained)
                    else "states"
                )
                self.edges[number].append(
                    edges_of_update(part.forest, part.credit, number, weight, update.kl_weight > 0, granularity)
                )
        self.batches: list[list[tuple[Rolled, MicroBatch]]] = []
        self.cut(0)

    def cut(self, first: int) -> None:
        """Divides updates `first` and later into passes of the budget's size."""
        self.batches[first:] = [self._batches_of(number) for number in range(first, self.updates)]

    def shrink(self, number: int) -> bool:
        """Makes update `number` and those after it smaller; False if nothing is left to do."""
        remedies = {
            DROP_GRAPHS: self.drop_graphs,
            FORGET_RECORDINGS: self.runner.forget,
            HALVE_PASSES: self.budget.halve,
        }
        if not Shrink(remedies)():
            return False
        self.batches[number:] = []
        self.cut(number)
        return True

    def drop_graphs(self) -> bool:
        """Lets go of the rollout's graphs: they are used up, or too large. Returns whether any was held."""
        held = any(one.velocity is not None for part in self.parts for one in part.forest.retained)
        for part in self.parts:
            part.forest.retained.clear()
        return held

    def _batches_of(self, number: int) -> list[tuple[Rolled, MicroBatch]]:
        scale = 1 / max(self.selected[number], 1)
        parts = zip(self.parts, self.edges[number], strict=True)
        return [
            (part, batch) for part, edges in parts for batch in self._batches_of_part(part, edges, number == 0, scale)
        ]

    def _batches_of_part(self, part: Rolled, edges: Edges, first: bool, scale: float) -> list[MicroBatch]:
        retained = [
            (_rows_of(each, part.forest, edges), each.velocity)
            for each in part.forest.retained
            if first and each.velocity is not None
        ]
        taken = np.zeros(len(edges), dtype=bool)
        for rows, _ in retained:
            taken[rows] = True
        retained = [(rows, velocity) for rows, velocity in retained if edges.children[rows].any()]
        passes = [rows for rows, _ in retained] + list(self._passes(part, edges, np.flatnonzero(~taken)))
        velocities = [velocity for _, velocity in retained]
        return micro_batches(
            edges, part.forest.plan, part.coefficients, passes, velocities, scale, part.policy.state_dtype
        )

    def _passes(self, part: Rolled, edges: Edges, rows: Ints) -> Iterator[Ints]:
        """`rows` in as few passes as can be, each of one expert (models/experts.py says why); to replay the rollout,
        its own passes, those without an edge left out.
        """
        tokens = part.prompts.tokens[edges.prompt]
        if not self.replays:
            rows, plan = rows[edges.children[rows] > 0], part.forest.plan
            expert = np.array([plan.experts.index(step.expert) if step.trained else -1 for step in plan.steps])
            for number in range(len(plan.experts)):
                mine = rows[expert[edges.step[rows]] == number]
                yield from (mine[some] for some in self.budget.passes(tokens[mine]))
            return
        for step in part.forest.plan.trained_steps:
            level = rows[edges.step[rows] == step.index]
            yield from (level[some] for some in self.budget.passes(tokens[level]) if edges.children[level[some]].any())

    def to_refresh(self) -> list[tuple[Rolled, MicroBatch]]:
        """The passes that `refresh_old_logp` runs."""
        return [batch for passes in self.batches[1:] for batch in passes] if self.refreshes_logp else []

    @torch.no_grad()
    def refresh_old_logp(self, some: list[tuple[Rolled, MicroBatch]] | None = None) -> None:
        """bf16 passes depend on their batch: later updates compare with the old policy's logp in the
        very batches that they train in. `some` of these; None: all.
        """
        for part, batch in self.to_refresh() if some is None else some:
            with span("old_logp", rows=len(batch), tokens=part.tokens_of(batch)):
                v, v_uncond, scale = part.velocity(self.runner, batch)
                states, logp = part.forest.states, part.forest.logp
                with span("flow_logprob", OPS, len(batch)):
                    logp[batch.child] = flow_logprob(
                        states[batch.state],
                        v,
                        states[batch.child],
                        batch.coef,
                        child_offsets=batch.offsets,
                        v_uncond=v_uncond,
                        guidance_scale=scale,
                    )


def _rows_of(one: RetainedPass, forest: Forest, edges: Edges) -> Ints:
    """Where the states of a retained pass stand in `edges`, whose rows are whole levels."""
    step = forest.plan.steps[one.step]
    return np.searchsorted(edges.state, forest.first_row[one.step] + one.prompt * step.nodes_in + one.node)


def step_weights(plan: RolloutPlan, kind: str) -> dict[int, float]:
    """ω of every trained step: 1; TempFlow-GRPO (2508.04324) ∝ s with mean 1; GRPO-Guard (2510.22319) 1/Δ; leaves below
    an edge, with mean 1 over the edges of these steps, so that every step counts alike.
    """
    if kind == "guard":
        return {step.index: 1.0 / (step.sigma - step.sigma_next) for step in plan.trained_steps}
    if kind == "tempflow":
        table = plan_coefficients(plan).std.tolist()
        stds = {step.index: table[step.index] for step in plan.trained_steps}
        mean = sum(stds.values()) / max(len(stds), 1)
        return {index: std / mean for index, std in stds.items()}
    if kind == "leaves":
        edges = sum(step.nodes_out for step in plan.trained_steps)
        return {step.index: edges / (len(plan.trained_steps) * step.nodes_out) for step in plan.trained_steps}
    return {step.index: 1.0 for step in plan.trained_steps}
