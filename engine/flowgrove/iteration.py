"""One iteration: plan → rollout → reward → credit → update, and the line that tells of it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrove.credit import EdgeCredit, advantage_by_step, assign_credit, part_of
from flowgrove.device import to_host
from flowgrove.models.attention import runs_alone
from flowgrove.models.compiled_passes import compile_ahead
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.division import Division
from flowgrove.plan.planner import RolloutPlan
from flowgrove.ranks import Ranks
from flowgrove.rewards.faults import Faults
from flowgrove.rewards.registry import Rewards
from flowgrove.rewards.scoring import Scoring, rolled_together
from flowgrove.rollout.ahead import Ahead
from flowgrove.rollout.forest import Forest, leaf_path_logp
from flowgrove.rollout.loop import rollout
from flowgrove.run.summaries import peak_memory, reward_summary, update_summary
from flowgrove.setup import Setup
from flowgrove.spans import Clock, span
from flowgrove.split_evidence import SplitEvidence
from flowgrove.tuning.graph_room import GraphRoom
from flowgrove.update.gradient_noise import gradient_noise
from flowgrove.update.passes import Rolled, Whole
from flowgrove.update.updater import Updater
from flowgrove_kernels import StepCoefficients

# what looks at an iteration after its credit: this rank's prompts, the scores of all leaves, and what its updates are
Look = Callable[[list[Rolled], Tensor, Whole], None]


class NothingScoredError(Exception):
    """Not one prompt of an iteration could be scored, for this `reason`; nothing was trained."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True)
class Bucket:
    """The prompts of an iteration that are drawn at size number `size`, or this rank's of them; `first_prompt`: the
    number of the first of them in the iteration.
    """

    size: int
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
        self,
        setup: Setup,
        policy: Policy,
        updater: Updater,
        rewards: Rewards,
        room: GraphRoom | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.recipe = setup.recipe
        self.ranks = ranks or Ranks()
        self.policy = policy
        self.updater, self.runner = updater, updater.runner
        self.rewards = rewards
        self.device = policy.device
        # one for the run: the allocator keeps freed memory per stream; of high priority, so that it is none of those
        # that passes are recorded in
        self._stream = torch.cuda.Stream(policy.device, priority=-1) if policy.device.type == "cuda" else None
        alone = runs_alone(self.recipe)
        # where that gains something; a profiler sees only the iteration's own
        self.scores_on_a_thread = not alone
        self._ahead = Ahead(policy.device) if self.recipe.engine.ahead and not alone else None
        self._setup = setup
        self.evidence = self._no_evidence()
        self.sizes = [(policy.sized(each.recipe), each) for each in setup.sizes]
        largest = max((sized for sized, _ in self.sizes), key=lambda sized: sized.adapter.geometry.tokens)
        self.room = self._room(setup, largest) if room is None else room
        self._compiles = bool(self.recipe.engine.compile)

    def _room(self, setup: Setup, largest: Policy) -> GraphRoom:
        return GraphRoom.of(setup, largest, self.runner, Division.of(setup.recipe.engine, self.ranks.size))

    def _no_evidence(self) -> SplitEvidence | None:
        """None where the recipe gives the splits, or has no tree."""
        search = self._setup.split_search
        return None if search is None else SplitEvidence(search, self.recipe.credit, self.rewards.weights)

    def run(
        self, texts: list[str], iteration: int, look: Look | None = None, upcoming: list[str] | None = None
    ) -> dict[str, Any]:
        """Trains on `texts`, each rank on its share of them, and returns the metrics line, which is that of all.

        `look`: is shown the first rank's part of the iteration before the updates, in nobody's time. `upcoming`: the
        texts of the next iteration, which engine.ahead encodes while this one's updates run.

        Prompts that cannot be scored are left out. Raises NothingScoredError if that is all of them.
        """
        if self._compiles:  # in nobody's time
            self._compiles = False
            with span("compile"):
                compile_ahead(self.policy, self.recipe, self.runner.budget.rows)
        with span(f"iteration {iteration}"):
            return self._run(texts, iteration, look, upcoming or [])

    def settle(self) -> None:
        """Waits until nothing is encoded beside what comes next: encoders and autoencoders serve one at a time."""
        if self._ahead is not None:
            self._ahead.settle()

    def _run(self, texts: list[str], iteration: int, look: Look | None, upcoming: list[str]) -> dict[str, Any]:
        clock, ranks = Clock(self.device), self.ranks
        counts = [len(texts[size :: len(self.sizes)]) for size in range(len(self.sizes))]
        if iteration == 0:
            self.evidence = self._no_evidence()
        chosen = None if self.evidence is None else self.evidence.chosen
        with clock("plan"):
            plans = [
                sized.plan(iteration, chosen) for (_, sized), count in zip(self.sizes, counts, strict=True) if count
            ]
            plan, buckets = plans[0], ranks.together(lambda: self._buckets(texts, plans))
        faults = Faults()
        with self.policy.weights.gathered():
            forests, mine = ranks.together(lambda: self._roll_out_and_score(buckets, iteration, clock, faults))
        with clock("credit"):
            scores = self._of_all_ranks(mine, buckets, counts, plan.leaves)
            scored = self._scored(scores, plan.leaves, buckets, forests, faults, iteration)
            credit = self._credit(plan, forests, scores, buckets, counts)
            rolled = [
                Rolled(b.policy, forest, b.prompts, part_of(credit, b.numbers), b.coefficients, b.first_prompt)
                for b, forest in zip(buckets, forests, strict=True)
            ]
            whole = Whole.of_credit(self.recipe, plan, credit)
        if look is not None:
            with span("forest"):
                ranks.by_first(lambda: look(rolled, scores, whole))
        measured = self._gradient_noise(plan, rolled, credit, scored, clock)
        if self._ahead is not None:
            for _, policy, next_texts, _ in self._shares(upcoming):
                self._ahead.start(policy, next_texts)
        with clock("update"):
            stats = self.updater.run(rolled, whole).gathered(ranks)
        times = torch.tensor([list(clock.seconds.values())], dtype=torch.float64)
        seconds = dict(zip(clock.seconds, torch.cat(ranks.gather(times)).amax(0).tolist(), strict=True))
        forwards = plan.counts.rollout_forwards if self.recipe.engine.share else plan.counts.unshared_rollout_forwards
        return {
            "iteration": iteration,
            **reward_summary(
                list(self.rewards.scorers), self.rewards.weights, scores.unflatten(0, (-1, plan.leaves))[scored]
            ),
            "dropped_prompts": int((~scored).sum()),
            **update_summary(stats),
            "advantage_by_step": advantage_by_step(credit),
            **self._split_evidence(plan, scores),
            **measured,
            "rollout_forwards": forwards * len(texts),
            "train_passes": stats.train_passes,
            "seconds": seconds,  # of the slowest rank, for which the others wait
            "samples_per_second": len(scores) / sum(seconds.values()),
            "peak_memory_bytes": ranks.most(peak_memory(self.device)),
        }

    def _split_evidence(self, plan: RolloutPlan, scores: Tensor) -> dict[str, Any]:
        """Takes what a probing iteration shows of its splits, and tells of it. It comes after the updates: a run that
        is stopped before them saves what it knew when it began the iteration.
        """
        evidence = self.evidence
        if evidence is None:
            return {}
        told = {"tree_splits": [step.index for step in plan.steps if step.fanout > 1]}
        if plan.iteration >= evidence.search.probe:
            return told
        evidence.add(plan, scores.numpy().reshape(-1, plan.leaves, scores.shape[-1]))
        if evidence.chosen is not None:  # CPUs of several kinds might round to different choices
            evidence.chosen = tuple(json.loads(self.ranks.chosen(json.dumps(evidence.chosen)) or "[]"))
        return told | evidence.told()

    def _gradient_noise(
        self, plan: RolloutPlan, rolled: list[Rolled], credit: dict[int, EdgeCredit], scored: Tensor, clock: Clock
    ) -> dict[str, Any]:
        """Signal and noise of the gradient, where the recipe wants them of this iteration."""
        if not self.recipe.run.measures_noise(plan.iteration):
            return {}
        with clock("gradient_noise"):
            return gradient_noise(self.updater, plan, rolled, credit, scored.numpy())

    def _buckets(self, texts: list[str], plans: list[RolloutPlan]) -> list[Bucket]:
        """Prompt i is drawn at size i modulo their number; prompts are numbered size after size, and each size's are
        divided among the ranks. A rank has no bucket of a size that leaves it nothing.
        """
        encode = Policy.encode if self._ahead is None else self._ahead.take
        return [
            Bucket(
                size, policy, plans[size], plan_coefficients(plans[size]).to(self.device, non_blocking=True),
                encode(policy, mine), first,
            )
            for size, policy, mine, first in self._shares(texts)
        ]  # fmt: skip

    def _shares(self, texts: list[str]) -> Iterator[tuple[int, Policy, list[str], int]]:
        """This rank's share of the prompts of each size: its number, its policy, the texts, and the first one's number.
        None of a size that leaves it nothing.
        """
        of_sizes = [texts[size :: len(self.sizes)] for size in range(len(self.sizes))]
        shares = self.ranks.shares([len(some) for some in of_sizes])
        first = 0
        for size, (some, share) in enumerate(zip(of_sizes, shares, strict=True)):
            if some[share]:
                yield size, self.sizes[size][0], some[share], first + share.start
            first += len(some)

    def _roll_out_and_score(
        self, buckets: list[Bucket], iteration: int, clock: Clock, faults: Faults
    ) -> tuple[list[Forest], Tensor]:
        """A forest of every bucket; scores float64 [leaves, rewards] of all their leaves, on the CPU."""
        threaded = self.scores_on_a_thread
        with Scoring(self.rewards, self.runner, self.device, self._stream, faults, threaded) as scoring:
            with clock("rollout"):
                forests = self._roll_out(buckets, scoring, iteration)
            with clock("reward"):
                return forests, scoring.scores() if buckets else torch.empty(0, len(self.rewards.weights)).double()

    def _scored(
        self, scores: Tensor, leaves: int, buckets: list[Bucket], forests: list[Forest], faults: Faults, iteration: int
    ) -> Tensor:
        """Which of all prompts have a score of every leaf, bool [prompts] on the CPU. The rest is dropped: nothing of
        it trains, and its states are blank, since those that are not finite would spoil whatever shares a pass.

        Raises NothingScoredError on all ranks where none is left.
        """
        scored = scores.view(-1, leaves * scores.shape[1]).isfinite().all(1)
        left_out = 0
        for bucket, forest in zip(buckets, forests, strict=True):
            unscored = (~scored[bucket.numbers]).nonzero().flatten().tolist()
            forest.blank(unscored)
            left_out += len(unscored)
        if not scored.any():
            try:
                self.ranks.together(faults.raise_first)
            except Exception as error:
                raise NothingScoredError(error) from error
        faults.tell(f"iteration {iteration}", left_out)
        return scored

    def _of_all_ranks(self, mine: Tensor, buckets: list[Bucket], counts: list[int], each: int) -> Tensor:
        """`each` rows a prompt, in host memory: those of this rank's buckets → those of all prompts, by number."""
        parts = [mine[:0] for _ in counts]
        lengths = [each * len(bucket.prompts) for bucket in buckets]
        for bucket, part in zip(buckets, mine.split(lengths), strict=True):
            parts[bucket.size] = part
        return torch.cat(self.ranks.gather_parts(parts, counts, each))

    def _roll_out(self, buckets: list[Bucket], scoring: Scoring, iteration: int) -> list[Forest]:
        """One forest per bucket. Where scoring runs beside it, some prompts at a time, but whole levels where a replay
        repeats them.
        """
        seed = self.recipe.run.seed
        share = self.recipe.engine.share
        forests = []
        retained = self.room.retained_graphs(self.policy, self.runner)
        for bucket in buckets:
            policy, plan, leaves = bucket.policy, bucket.plan, bucket.plan.leaves
            narrowest = int(bucket.prompts.tokens.min()) * (plan.roots if share else leaves)
            together = (
                rolled_together(self.runner.budget.tokens, narrowest)
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
                scoring.submit(policy, parts[-1].leaves, [text for text in some.texts for _ in range(leaves)], leaves)
            forests.append(Forest.joined(parts))
        return forests

    def _credit(
        self, plan: RolloutPlan, forests: list[Forest], scores: Tensor, buckets: list[Bucket], counts: list[int]
    ) -> dict[int, EdgeCredit]:
        """The credit of all prompts' edges, on every rank: what is normalised, counted or pruned over all prompts is
        then exact without asking again. The plans of several sizes differ in σ alone, so that any of them serves.
        """
        settings, path_logp = self.recipe.credit, None
        if settings.fusion_beta:
            mine = [to_host(leaf_path_logp(forest)).double() for forest in forests]
            whole = self._of_all_ranks(torch.cat([*mine, torch.empty(0, plan.leaves).double()]), buckets, counts, 1)
            path_logp = whole.numpy()
        of_leaves = scores.numpy().reshape(-1, plan.leaves, scores.shape[-1])
        return assign_credit(plan, settings, of_leaves, self.rewards.weights, path_logp)
