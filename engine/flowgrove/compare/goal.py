"""How long the runs of a comparison train, and what they have spent: iterations, weighted passes or seconds.

An iteration costs rollout_forwards + 3 · train_passes weighted passes (`weighted_passes`), whatever machine it runs on.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from flowgrove.errors import UserError
from flowgrove.plan.planner import weighted_passes
from flowgrove.recipe.windows import pruned_depths, window_steps
from flowgrove.setup import Setup

_FEWEST = 2  # iterations: the line of a single one has room for one evaluation, and no curve has one point
_MOST = 1_000_000  # iterations of a run
_MEASURING = "gradient_noise"  # a stage
Axis = Literal["weighted_passes", "seconds"]
AXES: tuple[Axis, ...] = ("weighted_passes", "seconds")
Unit = Literal["iterations"] | Axis
Lines = list[dict[str, Any]]


def passes_before(lines: Lines) -> list[int]:
    """The weighted passes of all lines before each one, and of all of them: one number more than there are lines."""
    costs = (weighted_passes(line["rollout_forwards"], line["train_passes"]) for line in lines)
    return list(accumulate(costs, initial=0))


def seconds_before(lines: Lines) -> list[float]:
    """The seconds of stages in the same way, without those that measure the gradient's noise and train nothing."""
    taken = (sum(time for stage, time in line["seconds"].items() if stage != _MEASURING) for line in lines)
    return list(accumulate(taken, initial=0.0))


def planned_iterations(setup: Setup, passes: float) -> int:
    """The iterations after which a run will have spent so many weighted passes, by the counts of its plans: the window
    moves, and so does the cost. It may take a few more: edges whose advantage turns out to be 0 cost nothing, splits
    that the run chooses (rollout.tree.splits: auto) are counted as a tree that takes their budget, and what is drawn
    anew every iteration (update.step_fraction, update.edges_per_update) changes the count a little. Raises UserError
    for more than a run can have.
    """
    recipe, known = setup.recipe, dict[object, int]()
    spent = 0
    for iteration in range(_MOST):
        window = window_steps(recipe.rollout.window, recipe.rollout.steps, iteration, recipe.run.seed)
        place: tuple[object, ...] = (window, frozenset(pruned_depths(recipe.credit.prune, iteration)))
        if setup.split_search is not None:
            place += (setup.split_search.splits(iteration, None),)
        if place not in known:
            counts = setup.plan(iteration).counts
            shared = counts.rollout_forwards, counts.train_passes
            alone = counts.unshared_rollout_forwards, counts.unshared_train_passes
            cost = weighted_passes(*(shared if recipe.engine.share else alone))
            known[place] = cost * recipe.data.prompts_per_iteration
        spent += known[place]
        if spent >= passes:
            return iteration + 1
    raise UserError(f"--cost {passes:,.0f} takes more than {_MOST:,} iterations: give fewer weighted passes")


@dataclass(frozen=True)
class Goal:
    """What every run trains to: so many iterations (None: those of its recipe), or until it has spent so many weighted
    passes or seconds of its stages.
    """

    unit: Unit
    amount: float | None

    def spent(self, lines: Lines) -> float:
        """What a run with these lines has spent, in the goal's unit."""
        if self.unit == "iterations":
            return _completed(lines)
        return (passes_before if self.unit == "weighted_passes" else seconds_before)(lines)[-1]

    def share(self, setup: Setup, lines: Lines) -> float:
        """How much of the way a run has come, from 0 to 1."""
        return min(1.0, self.spent(lines) / self._wanted(setup))

    def iterations(self, setup: Setup, lines: Lines) -> int:
        """What a run with these lines has to train to next. It may spend less by then than was foreseen, and has to be
        asked again.
        """
        done = _completed(lines)
        planned = self._planned(setup)
        missing = self._wanted(setup) - self.spent(lines)
        if missing <= 0 or done < planned:
            return max(done, planned)
        return done + max(1, -int(-missing * done // self.spent(lines)))

    def _wanted(self, setup: Setup) -> float:
        return max(_FEWEST, setup.recipe.run.iterations) if self.amount is None else self.amount

    def _planned(self, setup: Setup) -> int:
        """Where it is known beforehand; to reach a number of seconds, it has to be seen what an iteration takes."""
        wanted = self._wanted(setup)
        if self.unit == "seconds":
            return _FEWEST
        return max(_FEWEST, int(wanted) if self.unit == "iterations" else planned_iterations(setup, wanted))


def _completed(lines: Lines) -> int:
    return lines[-1]["iteration"] + 1 if lines else 0
