"""How the ranks of a run divide it, and what that leaves to each. No tensors, no model."""

from dataclasses import dataclass

from flowgrove.errors import UserError
from flowgrove.plan.planner import RolloutPlan
from flowgrove.process import shares_of
from flowgrove.recipe.checks import shards_of
from flowgrove.recipe.schema import Engine, Recipe


@dataclass(frozen=True)
class Division:
    """The prompts of an iteration are divided among `ranks`, the large weights among `shards` of them (a divisor of
    `ranks`); None: every rank holds all weights.
    """

    ranks: int = 1
    shards: int | None = None

    @classmethod
    def of(cls, engine: Engine, ranks: int) -> "Division":
        """What the recipe's engine section makes of so many ranks. Raises UserError where engine.distributed is none
        and there are several, and where engine.shard_degree does not divide them.
        """
        if engine.distributed == "none" and ranks > 1:
            raise UserError(f"engine.distributed is none, which is for one rank, not {ranks}: write ddp or fsdp2")
        if engine.distributed != "fsdp2":
            return cls(ranks)
        return cls(ranks, shards_of(engine, ranks))

    def prompts(self, recipe: Recipe) -> list[int]:
        """How many prompts of an iteration each rank draws and trains: the prompts of every size are divided."""
        return [sum(of_rank) for of_rank in self.prompts_by_size(recipe)]

    def prompts_by_size(self, recipe: Recipe) -> list[list[int]]:
        """The same for each of model.sizes."""
        sizes = len(recipe.model.sizes or [None])
        counts = [len(range(size, recipe.data.prompts_per_iteration, sizes)) for size in range(sizes)]
        shares = [shares_of(counts, rank, self.ranks) for rank in range(self.ranks)]
        return [[share.stop - share.start for share in of_rank] for of_rank in shares]

    def work(self, recipe: Recipe, plan: RolloutPlan) -> tuple["Work", "Work"]:
        """That of the rank with the most prompts, and with the fewest."""
        prompts, share, counts = self.prompts(recipe), recipe.engine.share, plan.counts
        forwards = counts.rollout_forwards if share else counts.unshared_rollout_forwards
        passes = counts.train_passes if share else counts.unshared_train_passes
        most, fewest = (Work(some, some * forwards, some * passes) for some in (max(prompts), min(prompts)))
        return most, fewest


ALONE = Division()


@dataclass(frozen=True)
class Work:
    """What a rank does in an iteration; a pass is one row, as in a plan's counts."""

    prompts: int
    rollout_forwards: int
    train_passes: int
