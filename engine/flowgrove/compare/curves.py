"""What the runs of a comparison have reached at what cost, and each recipe at its own best learning rate.

Rewards are read at equal cost: on the line between the evaluations before and after it.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flowgrove.compare.goal import Axis, Lines, passes_before, seconds_before
from flowgrove.compare.runs import Run
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.report.lines import evaluations, total_reward


class Point(NamedTuple):
    """An evaluation: after so many iterations, which took so many weighted passes and seconds of stages.
    `training_reward`: the mean over the iterations since the evaluation before; with the first, of iteration 0.
    """

    iteration: int
    weighted_passes: float
    seconds: float
    held_out_reward: float
    training_reward: float


@dataclass(frozen=True)
class Curve:
    """The evaluations of a recipe at a learning rate with a seed, in their order. `done`: whether the last comes after
    all of the run's iterations. `unscored`: whether that one is missing, as none of its prompts could be scored.
    """

    recipe: str
    lr: float
    seed: int
    points: list[Point]
    done: bool = True
    unscored: bool = False

    def at(self, cost: float, axis: Axis = "weighted_passes", key: str = "held_out_reward") -> float | None:
        """A value at a cost, None beyond the last evaluation."""
        costs = [getattr(point, axis) for point in self.points]
        if not costs or cost > costs[-1] * (1 + 1e-9):
            return None
        return float(np.interp(cost, costs, [getattr(point, key) for point in self.points]))


@dataclass(frozen=True)
class Search:
    """The learning rates that the first seed has chosen at a cost, by recipe."""

    cost: float
    rates: dict[str, float]


@dataclass(frozen=True)
class Reached:
    """What a recipe has reached at a cost, at the best of the learning rates that all seeds have taken so far: the one
    of the highest mean over seeds. `untried`: those that some seed has not; `unscored`: those of them that have trained
    so far with every seed, and whose last evaluation has no reward. With `search` the first seed has chosen at that
    cost, and `tried` and the others are those of the search.
    """

    recipe: str
    axis: Axis
    cost: float
    lr: float
    rewards: tuple[float, ...]  # of each seed
    seeds: tuple[int, ...]
    before: float  # of the base model
    iterations: float
    weighted_passes: float
    seconds: float
    tried: tuple[float, ...]
    untried: tuple[float, ...]
    unscored: tuple[float, ...]
    search: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def std(self) -> float:
        """The sample standard deviation over seeds; 0 of one."""
        return statistics.stdev(self.rewards) if len(self.rewards) > 1 else 0.0

    @property
    def at_the_edge(self) -> str | None:
        """Whether the best is the smallest or the largest learning rate of several, so that others may do better."""
        if len(self.tried) < 2 or self.tried[0] < self.lr < self.tried[-1]:
            return None
        return "smallest" if self.lr == self.tried[0] else "largest"


def points_of(recipe: Recipe, lines: Lines) -> list[Point]:
    """The evaluations in the metrics lines of a run of `recipe`."""
    passes, seconds = passes_before(lines), seconds_before(lines)
    place = {line["iteration"]: number for number, line in enumerate(lines)}
    found, since = [], 0
    for done, reward in evaluations(lines, recipe.run.iterations):
        number = place.get(done, len(lines))
        trained = lines[since:number] or lines[since : since + 1] or lines[-1:]
        training = statistics.fmean(total_reward(recipe, line) for line in trained)
        found.append(Point(done, passes[number], seconds[number], reward, training))
        since = number
    return found


def curve_of(run: Run) -> Curve:
    """What is in the folder of a run."""
    lines = run.lines()
    if not lines:
        return Curve(run.name, run.lr, run.seed, [], False)
    recipe = load_recipe(run.folder / "recipe.yaml")
    points = points_of(recipe, lines)
    done = bool(points) and points[-1].iteration == recipe.run.iterations
    unscored = lines[-1]["iteration"] + 1 == recipe.run.iterations and lines[-1].get("eval_reward") is None
    return Curve(run.name, run.lr, run.seed, points, done, unscored)


def summarise(curves: list[Curve], axis: Axis, costs: Sequence[float], search: Search | None = None) -> list[Reached]:
    """Each recipe at each cost, the best first; without those that no learning rate has brought there on all seeds.
    Without costs: at the weighted passes that all runs which are done have spent.
    """
    found = []
    for cost in costs or _in_common(curves):
        names = dict.fromkeys(curve.recipe for curve in curves)
        each = [_reached([one for one in curves if one.recipe == name], axis, cost, search) for name in names]
        found += sorted((one for one in each if one is not None), key=lambda one: -one.mean)
    return found


def _in_common(curves: list[Curve]) -> list[float]:
    spent = [curve.points[-1].weighted_passes for curve in curves if curve.done]
    return [min(spent)] if spent else []


def best_rates(curves: list[Curve], axis: Axis, search: float) -> dict[str, float]:
    """The learning rate of each recipe whose curve of the first seed is highest at the cost `search`; none of a recipe
    of which no curve has come so far.
    """
    found: dict[str, tuple[float, float]] = {}
    for curve in curves:
        reward = curve.at(search, axis) if curve.seed == curves[0].seed else None
        if reward is not None and reward > found.get(curve.recipe, (0.0, -math.inf))[1]:
            found[curve.recipe] = curve.lr, reward
    return {recipe: rate for recipe, (rate, _) in found.items()}


def _reached(curves: list[Curve], axis: Axis, cost: float, search: Search | None) -> Reached | None:
    if search is None:
        return _best_over_seeds(curves, axis, cost)
    chosen = [curve for curve in curves if curve.lr == search.rates.get(curves[0].recipe)]
    found = _best_over_seeds(chosen, axis, cost) if chosen else None
    first = _best_over_seeds([curve for curve in curves if curve.seed == curves[0].seed], axis, search.cost)
    if found is None or first is None:
        return None
    return replace(found, tried=first.tried, untried=first.untried, unscored=first.unscored, search=search.cost)


def _best_over_seeds(curves: list[Curve], axis: Axis, cost: float) -> Reached | None:
    rates = sorted({curve.lr for curve in curves})
    rewards = {rate: {curve.seed: curve.at(cost, axis) for curve in curves if curve.lr == rate} for rate in rates}
    there = {
        rate: [reward for reward in found.values() if reward is not None]
        for rate, found in rewards.items()
        if None not in found.values()
    }
    if not there:
        return None
    best = max(there, key=lambda rate: statistics.fmean(there[rate]))
    chosen = [curve for curve in curves if curve.lr == best]

    def mean(key: str) -> float:
        return statistics.fmean(curve.at(cost, axis, key) or 0.0 for curve in chosen)

    def trained(rate: float) -> bool:
        return all(curve.unscored or curve.at(cost, axis) is not None for curve in curves if curve.lr == rate)

    return Reached(
        recipe=curves[0].recipe, axis=axis, cost=cost, lr=best,
        rewards=tuple(there[best]), seeds=tuple(rewards[best]),
        before=statistics.fmean(curve.points[0].held_out_reward for curve in chosen), iterations=mean("iteration"),
        weighted_passes=mean("weighted_passes"), seconds=mean("seconds"), tried=tuple(there),
        untried=tuple(rate for rate in rates if rate not in there),
        unscored=tuple(rate for rate in rates if rate not in there and trained(rate)),
    )  # fmt: skip
