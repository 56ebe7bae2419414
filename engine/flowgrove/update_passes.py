"""The passes of an iteration's updates: which rows train together, and again in smaller passes where the device's memory is too small."""

from collections.abc import Iterator

import numpy as np
import torch

from flowgrove.credit import EdgeCredit
from flowgrove.edges import Edges, edges_of_update
from flowgrove.forest import Forest, KeptPass
from flowgrove.micro_batches import MicroBatch, micro_batches
from flowgrove.models.policy import Policy, Prompts, Velocity
from flowgrove.packing import Ints
from flowgrove.plan import RolloutPlan
from flowgrove.recipe import Recipe
from flowgrove.rows import plan_rows
from flowgrove.spans import span
from flowgrove_kernels import StepCoefficients, flow_logprob


class UpdatePasses:
    """What the updates of one iteration have to do: `batches[u]`: the passes of update u."""

    def __init__(
        self, recipe: Recipe, policy: Policy, forest: Forest, prompts: Prompts, credit: dict[int, EdgeCredit], rows: StepCoefficients, first_prompt: int
    ) -> None:
        self.recipe, self.policy, self.forest, self.prompts, self.rows, self.first_prompt = recipe, policy, forest, prompts, rows, first_prompt
        update, engine = recipe.update, recipe.engine
        self.replays = engine.exact_replay and engine.share
        weights = step_weights(forest.plan, update.step_weight)
        kinds = ["edges" if not engine.share else "levels" if self.replays or (number == 0 and forest.kept) else "states" for number in range(self.updates)]
        self.edges = [edges_of_update(forest, credit, number, weights, update.kl_weight > 0, kind) for number, kind in enumerate(kinds)]
        self.batches: list[list[MicroBatch]] = []

    @property
    def updates(self) -> int:
        return self.recipe.update.updates_per_iteration

    def cut(self, first: int) -> None:
        """Divides updates `first` and later into passes of the budget's size."""
        self.batches[first:] = [self._micro_batches(number) for number in range(first, self.updates)]
        engine, update = self.recipe.engine, self.recipe.update
        noisy = self.policy.compute_dtype == torch.bfloat16 and engine.share and not self.replays
        if first == 0 and noisy and update.step_weight != "guard":  # guard needs no logp, replay has it
            self._replay_old_logp()

    def shrink(self, number: int) -> bool:
        """Makes update `number` and those after it smaller; False if nothing is left to do."""
        held = any(kept.velocity is not None for kept in self.forest.kept)
        self.forest.kept.clear()
        if not held and not self.policy.budget.halve():
            return False
        self.batches[number] = []
        self.cut(number)
        return True

    def velocity(self, batch: MicroBatch) -> Velocity:
        """The model's, of a pass."""
        with span("transformer"):
            return self.policy.velocity(self.forest.states[batch.state], batch.sigma, self.prompts, batch.prompt, self.longest(batch))

    def longest(self, batch: MicroBatch) -> int:
        """Tokens of the pass's longest text."""
        return int(self.prompts.lengths[batch.prompts].max())

    def _micro_batches(self, number: int) -> list[MicroBatch]:
        edges = self.edges[number]
        kept = [(self._rows_of(kept, edges), kept.velocity) for kept in self.forest.kept if number == 0 and kept.velocity is not None]
        kept = [(rows, velocity) for rows, velocity in kept if edges.children[rows].any()]
        taken = np.zeros(len(edges), dtype=bool)
        for rows, _ in kept:
            taken[rows] = True
        passes = [rows for rows, _ in kept] + list(self._passes(edges, np.flatnonzero(~taken)))
        velocities = [velocity for _, velocity in kept]
        return micro_batches(edges, self.forest.plan, self.rows, passes, velocities, 1 / max(edges.selected, 1), self.policy.state_dtype)

    def _passes(self, edges: Edges, rows: Ints) -> Iterator[Ints]:
        """`rows` in as few passes as can be; to replay the rollout, its own passes, those without an edge left out."""
        tokens = self.prompts.tokens[edges.prompt]
        if not self.replays:
            rows = rows[edges.children[rows] > 0]
            yield from (rows[some] for some in self.policy.budget.passes(tokens[rows]))
            return
        for step in self.forest.plan.trained_steps:
            level = rows[edges.step[rows] == step.index]
            yield from (level[some] for some in self.policy.budget.passes(tokens[level]) if edges.children[level[some]].any())

    @torch.no_grad()
    def _replay_old_logp(self) -> None:
        """bf16 passes depend on their batch: later updates compare with the old policy's logp in the very batches that they train in."""
        for batch in (batch for passes in self.batches[1:] for batch in passes):
            v, v_uncond, scale = self.velocity(batch)
            x, x_next = self.forest.states[batch.state], self.forest.states[batch.child]
            self.forest.logp[batch.child] = flow_logprob(x, v, x_next, batch.coef, child_offsets=batch.offsets, v_uncond=v_uncond, guidance_scale=scale)

    def _rows_of(self, kept: KeptPass, edges: Edges) -> Ints:
        """Where the states of a kept pass stand in `edges`, whose rows are whole levels."""
        step = self.forest.plan.steps[kept.step]
        return np.searchsorted(edges.state, self.forest.first_row[kept.step] + kept.prompt * step.nodes_in + kept.node)


def step_weights(plan: RolloutPlan, kind: str) -> dict[int, float]:
    """ω of every trained step: 1; TempFlow-GRPO (2508.04324) ∝ s with mean 1; GRPO-Guard (2510.22319) 1/Δ."""
    if kind == "guard":
        return {step.index: 1.0 / (step.sigma - step.sigma_next) for step in plan.trained_steps}
    if kind == "tempflow":
        table = plan_rows(plan).std.tolist()
        stds = {step.index: table[step.index] for step in plan.trained_steps}
        mean = sum(stds.values()) / max(len(stds), 1)
        return {index: std / mean for index, std in stds.items()}
    return {step.index: 1.0 for step in plan.trained_steps}
