"""Which splits a tree may have within a budget of forwards, where `rollout.tree.splits` is auto.

A tree with n splits at the steps s_0 < … < s_{n−1} into K children, r roots and L levels costs r·K^k forwards at every
step after its k-th split, so that

    forwards = r·(K^n·L − (K^n − 1) − (K − 1)·Σ_k K^k·s_k)

which the leaves, r·K^n, leave open: an early split costs more than a late one. L hangs on the last split alone, where
the tail is compressed.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from flowgrove.errors import UserError
from flowgrove.plan.sigmas import tail_steps
from flowgrove.recipe.schema import Recipe

Splits = tuple[int, ...]
_MOST_STEPS = 100  # what is searched grows with their square
_MOST_BEHIND = 30  # uses by which a step is told apart from one that is used more often


class _Front(NamedTuple):
    """Some first splits: Σ_k K^k·s_k, which forwards fall with, and the sum of their weights."""

    saved: int
    value: int
    splits: Splits


@dataclass(frozen=True)
class SplitSearch:
    """The trees with `count` splits into `fanout`. `limit`: rollout.tree.forwards; `compress`: that of the tail, if
    there is one; `probe`: the iterations in which steps take turns as splits.
    """

    steps: int
    fanout: int
    count: int
    roots: int
    compress: float | None
    limit: int | None
    probe: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> "SplitSearch | None":
        """That of a recipe; None where its splits are given. Raises UserError where no tree has that many leaves, or
        none is within the budget.
        """
        rollout = recipe.rollout
        if rollout.tree is None or rollout.tree.splits != "auto":
            return None
        fanout, group = rollout.tree.fanout, rollout.group_size
        count = 0
        while group % fanout ** (count + 1) == 0:
            count += 1
        roots = group // fanout**count
        if rollout.steps > _MOST_STEPS:
            raise UserError(
                f"rollout.tree.splits is auto and rollout.steps {rollout.steps}: steps are chosen of up to "
                f"{_MOST_STEPS}; write the splits"
            )
        if count == 0 or (roots > 1 and rollout.shared_initial_noise):
            power = fanout
            while power * fanout <= group:
                power *= fanout
            raise UserError(
                f"rollout.group_size is {group}: with tree.splits: auto it must be a power of tree.fanout, {fanout}; "
                f"write {power}, or change tree.fanout"
            )
        if count > rollout.steps - 1:
            raise UserError(
                f"rollout.group_size is {group}: its {count} splits into {fanout} need {count + 1} steps; raise "
                "rollout.steps, or write a smaller group"
            )
        compress = None if rollout.tail is None else rollout.tail.compress
        tree = rollout.tree
        found = cls(rollout.steps, fanout, count, roots, compress, tree.forwards, tree.probe, recipe.run.seed)
        if found.limit is not None:
            least = found.forwards(_best(found, dict.fromkeys(found.candidates, 0), None))
            if found.limit < least:
                raise UserError(
                    f"rollout.tree.forwards is {found.limit}: the cheapest tree of {count} splits takes {least}; "
                    f"write {least} or more, or null"
                )
        return found

    @property
    def candidates(self) -> range:
        """The steps that may split: all but the last, which is never stochastic."""
        return range(self.steps - 1)

    def levels(self, last: int) -> int:
        """The steps of a rollout whose last split is at step `last`."""
        head = last + 1
        return self.steps if self.compress is None else head + tail_steps(self.steps - head, self.compress)

    def forwards(self, splits: Splits) -> int:
        """The forwards of a prompt's rollout."""
        return self._forwards(sum(self.fanout**place * step for place, step in enumerate(splits)), splits[-1])

    def _forwards(self, saved: int, last: int) -> int:
        leaves = self.fanout**self.count
        return self.roots * (leaves * self.levels(last) - (leaves - 1) - (self.fanout - 1) * saved)

    @cached_property
    def even(self) -> Splits:
        """Splits at equal distances over the candidates, from step 0 on."""
        return tuple(place * len(self.candidates) // self.count for place in range(self.count))

    @cached_property
    def budget(self) -> int:
        """The most forwards that a prompt's tree may cost."""
        return self.forwards(self.even) if self.limit is None else self.limit

    def fits(self, splits: Splits) -> bool:
        """Whether these are splits of such a tree within the budget."""
        rising = list(splits) == sorted(set(splits)) and all(step in self.candidates for step in splits)
        return rising and len(splits) == self.count and self.forwards(splits) <= self.budget

    def best(self, weights: Mapping[int, int]) -> Splits:
        """Of the trees within the budget that split at steps of `weights` alone, the one with the largest sum of
        weights; of several the one with the fewest forwards, then with the earlier splits. Exact, by dynamic
        programming over the steps. Raises ValueError if there is none.
        """
        return _best(self, weights, self.budget)

    @cached_property
    def probing(self) -> tuple[Splits, ...]:
        """The splits of every probing iteration, by the seed."""
        return _probing(self)

    @cached_property
    def dear(self) -> Splits:
        """A tree that takes all of the budget, or nearly: `even` where the budget is its, else the earliest last split,
        then the earliest one before it and so on, that are within the budget, for whichever last step takes most.
        """
        if self.limit is None:
            return self.even
        found = [
            splits for last in range(self.count - 1, self.steps - 1) if (splits := self._earliest(last)) is not None
        ]
        return max(found, key=lambda splits: (self.forwards(splits), [-step for step in splits]))

    def _earliest(self, last: int) -> Splits | None:
        splits = [*range(last - self.count + 1, last), last]
        if self.forwards(tuple(splits)) > self.budget:
            return None
        for place in reversed(range(self.count - 1)):
            for step in range(place, splits[place + 1]):
                earlier = [*range(step - place, step + 1), *splits[place + 1 :]]
                if self.forwards(tuple(earlier)) <= self.budget:
                    splits = earlier
                    break
        return tuple(splits)

    def splits(self, iteration: int, chosen: Splits | None) -> Splits:
        """Those of an iteration. `chosen`: what the probing has found; while that is not known, `dear` stands in."""
        if iteration < self.probe:
            return self.probing[iteration]
        return self.dear if chosen is None else chosen


def _best(search: SplitSearch, weights: Mapping[int, int], budget: int | None) -> Splits:
    """What SplitSearch.best finds; `budget` None: of all trees."""
    count, fanout = search.count, search.fanout
    fronts: list[list[_Front]] = [[_Front(0, 0, ())], *([] for _ in range(count - 1))]
    found: tuple[int, int, list[int]] | None = None
    for step in sorted(weights):
        for first in fronts[-1]:
            saved, value = first.saved + fanout ** (count - 1) * step, first.value + weights[step]
            forwards = search._forwards(saved, step)
            if budget is None or forwards <= budget:
                key = value, -forwards, [-other for other in (*first.splits, step)]
                found = key if found is None else max(found, key)
        for place in reversed(range(count - 1)):
            longer = [
                _Front(one.saved + fanout**place * step, one.value + weights[step], (*one.splits, step))
                for one in fronts[place]
            ]
            fronts[place + 1] = _not_beaten(fronts[place + 1] + longer)
    if found is None:
        raise ValueError("no tree is within the budget")
    return tuple(-step for step in found[2])


def _not_beaten(fronts: list[_Front]) -> list[_Front]:
    """Those of which none is both as cheap and as good."""
    kept: list[_Front] = []
    for one in sorted(fronts, key=lambda one: (-one.saved, -one.value, one.splits)):
        if not kept or one.value > kept[-1].value:
            kept.append(one)
    return kept


@lru_cache(maxsize=8)
def _probing(search: SplitSearch) -> tuple[Splits, ...]:
    """In every iteration as many as can be of the steps that have been splits least often, of these the earliest: they
    are dear, and what is left for later would be of early steps alone. The seed decides the order.
    """
    used = dict.fromkeys(search.candidates, 0)
    found = []
    for _ in range(search.probe):
        most = max(used.values())
        rank = search.count + 1  # so that one step of a rank counts more than all of the ranks behind it
        weights = {
            step: search.count * search.steps * rank ** min(most - times, _MOST_BEHIND) + search.steps - step
            for step, times in used.items()
        }
        found.append(search.best(weights))
        for step in found[-1]:
            used[step] += 1
    random.Random(f"splits/{search.seed}").shuffle(found)
    return tuple(found)
