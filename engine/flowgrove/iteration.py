"""One iteration: plan → rollout → reward → credit → update, and the line that tells of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowgrove.credit import EdgeCredit, advantage_by_step, assign_credit, part_of
from flowgrove.device import to_host
from flowgrove.models.policy import Policy, Prompts
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import RolloutPlan
from flowgrove.rewards.registry import Rewards
from flowgrove.rewards.scoring import Scoring
from flowgrove.rollout.forest import Forest, leaf_path_logp
from flowgrove.rollout.loop import rollout
from flowgrove.run.summaries import peak_memory, reward_summary, update_summary
from flowgrove.setup import Setup
from flowgrove.spans import Clock
from flowgrove.tuning.graph_room import GraphRoom
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from flowgrove_kernels import StepCoefficients


@dataclass(frozen=True)
class Bucket:
    """The prompts of an iteration that are drawn at one size; `first_prompt`: the number of the first of them."""

    policy: Policy
    plan: RolloutPlan
    coefficients: StepCoefficients
    prompts: Prompts
    first_prompt: int

    @property
    def numbers(self) -> slice:
        """The numbers of its prompts in the iteration."""
        return slice(self.first_prompt, self.first_prompt + len(self.prompts))

    def parts(self, together: int) -> Iterator[slice]:
        """The prompts, `together` at a time."""
        return (slice(start, start + together) for start in range(0, len(self.prompts), together))


class Stages:
    """The stages of an iteration, wired together. `room`: how many graphs of the rollout may be retained; None: as many
    as fit beside the policy and the token budget, which is predicted here, before an iteration's clock runs.
    """

    def __init__(
        self, setup: Setup, policy: Policy, updater: Updater, rewards: Rewards, room: GraphRoom | None = None
    ) -> None:
        self.recipe = setup.recipe
        self.policy = policy
        self.updater, self.runner = updater, updater.runner
        self.rewards = rewards
        self.device = policy.device
        # one for the run: the allocator keeps freed memory per stream; of high priority, so that it is none of those
        # that passes are recorded in
        self._stream = torch.cuda.Stream(policy.device, priority=-1) if policy.device.type == "cuda" else None
        self.sizes = [(policy.sized(each.recipe), each) for each in setup.sizes]
        largest = max((sized for sized, _ in self.sizes), key=lambda sized: sized.adapter.geometry.tokens)
        self.room = GraphRoom.of(setup, largest, self.runner) if room is None else room

    def run(self, texts: list[str], iteration: int) -> dict[str, Any]:
        """Trains on `texts` and returns the metrics line."""
        clock = Clock(self.device)
        with clock("plan"):
            buckets = self._buckets(texts, iteration)
        with Scoring(self.rewards, self.runner, self.device, self._stream) as scoring:
            with clock("rollout"):
                forests = self._roll_out(buckets, scoring, iteration)
            with clock("reward"):
                scores = scoring.scores()
        with clock("credit"):
            credit = self._credit(buckets[0].plan, forests, scores.numpy())
        with clock("update"):
            rolled = zip(buckets, forests, strict=True)
            stats = self.updater.run(
                [
                    Rolled(b.policy, forest, b.prompts, part_of(credit, b.numbers), b.coefficients, b.first_prompt)
                    for b, forest in rolled
                ]
            )
        counts = buckets[0].plan.counts
        return {
            "iteration": iteration,
            "reward": reward_summary(list(self.rewards.scorers), scores),
            **update_summary(stats),
            "advantage_by_step": advantage_by_step(credit),
            "rollout_forwards": (
                counts.rollout_forwards if self.recipe.engine.share else counts.unshared_rollout_forwards
            )
            * len(texts),
            "train_passes": stats.train_passes,
            "seconds": clock.seconds,
            "samples_per_second": len(scores) / sum(clock.seconds.values()),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def _buckets(self, texts: list[str], iteration: int) -> list[Bucket]:
        """Prompt i is drawn at size i modulo their number; prompts are numbered bucket after bucket."""
        buckets: list[Bucket] = []
        first = 0
        for place, (policy, sized) in enumerate(self.sizes):
            some = texts[place :: len(self.sizes)]
            if some:
                plan = sized.plan(iteration)
                buckets.append(
                    Bucket(
                        policy,
                        plan,
                        plan_coefficients(plan).to(self.device, non_blocking=True),
                        policy.encode(some),
                        first,
                    )
                )
                first += len(some)
        return buckets

    def _roll_out(self, buckets: list[Bucket], scoring: Scoring, iteration: int) -> list[Forest]:
        """One forest per bucket. Where scoring runs beside it, some prompts at a time: as many as fill half a pass at
        the forest's narrowest. A replay repeats whole levels, so there the rollout runs them whole.
        """
        seed = self.recipe.run.seed
        share = self.recipe.engine.share
        forests = []
        retained = self.room.retained_graphs(self.policy, self.runner)
        for bucket in buckets:
            policy, plan, leaves = bucket.policy, bucket.plan, bucket.plan.leaves
            narrowest = int(bucket.prompts.tokens.min()) * (plan.roots if share else leaves)
            together = (
                -(-self.runner.budget.tokens // (2 * narrowest))
                if scoring.beside and not self.recipe.engine.exact_replay
                else len(bucket.prompts)
            )
            parts: list[Forest] = []
            for some in (bucket.prompts[part] for part in bucket.parts(together)):
                first = bucket.first_prompt + sum(part.prompts for part in parts)
                parts.append(
                    rollout(
                        plan,
                        bucket.coefficients,
                        policy,
                        some,
                        self.runner,
                        seed=seed,
                        iteration=iteration,
                        first_prompt=first,
                        share=share,
                        retained=retained,
                    )
                )
                scoring.submit(policy, parts[-1].leaves, [text for text in some.texts for _ in range(leaves)])
            forests.append(Forest.joined(parts))
        return forests

    def _credit(self, plan: RolloutPlan, forests: list[Forest], scores: NDArray[np.float64]) -> dict[int, EdgeCredit]:
        """The credit of all prompts' edges. The buckets' plans differ in σ alone, so that any of them serves."""
        settings = self.recipe.credit
        path_logp = (
            np.concatenate([to_host(leaf_path_logp(forest)).double().numpy() for forest in forests])
            if settings.fusion_beta
            else None
        )
        return assign_credit(
            plan, settings, scores.reshape(-1, plan.leaves, scores.shape[-1]), self.rewards.weights, path_logp
        )
