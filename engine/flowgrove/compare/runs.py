"""Which runs a comparison is made of, read from its command line and checked before anything trains."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from flowgrove.compare.goal import Axis, Goal, Lines
from flowgrove.compare.judging import check_judged, judged
from flowgrove.errors import UserError
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.lines import whole_lines
from flowgrove.run.finding import valid_checkpoints
from flowgrove.run.manifest import DamagedError, read_state
from flowgrove.run.resume import differences, finished, phrase
from flowgrove.setup import Setup


@dataclass(frozen=True)
class Run:
    """One recipe at one learning rate with one seed, in a folder as `flowgrove train` makes it."""

    name: str
    lr: float
    seed: int
    setup: Setup
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.name}, learning rate {rate_text(self.lr)}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def lines(self) -> Lines:
        """Its metrics lines so far."""
        return whole_lines(self.setup.recipe, self.folder)

    def is_whole(self, goal: Goal) -> bool:
        """Whether its folder holds all of it: reads no model."""
        lines = self.lines()
        return goal.share(self.setup, lines) == 1 and finished(
            self.setup.trained_to(goal.iterations(self.setup, lines)), self.folder
        )


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they begin: every recipe with the first seed, then with the next. `costs`: where
    rewards are read, in the goal's unit, the largest last; none where runs have a number of iterations, and the least
    that one of them has spent is all that they have in common. `search`: the cost that the first seed's runs train to
    before the others begin, which go on with the best learning rate alone; None: all learning rates take all seeds.
    """

    out: Path
    runs: list[Run]
    goal: Goal
    costs: tuple[float, ...]
    search: float | None = None

    @property
    def axis(self) -> Axis:
        """What costs are costs in."""
        return "seconds" if self.goal.unit == "seconds" else "weighted_passes"

    def searching(self) -> "Comparison":
        """The runs that choose the learning rates."""
        first = [run for run in self.runs if run.seed == self.runs[0].seed]
        return replace(self, runs=first, goal=Goal(self.goal.unit, self.search))

    def of_rates(self, rates: dict[str, float]) -> "Comparison":
        """The runs at the learning rates that were chosen, by recipe; of one without, none."""
        return replace(self, runs=[run for run in self.runs if rates.get(run.name) == run.lr])


def comparison_of(
    recipes: list[Path],
    out: Path,
    overrides: tuple[str, ...] = (),
    seeds: str = "1,2,3",
    lrs: str | None = None,
    iterations: int | None = None,
    cost: str | None = None,
    seconds: str | None = None,
    search: float | None = None,
) -> Comparison:
    """The runs that the options of `flowgrove compare` ask for. Raises UserError for what cannot be compared."""
    given = [name for name, value in (("--iterations", iterations), ("--cost", cost), ("--seconds", seconds)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say how long runs train: give one of them")
    if cost is not None:
        costs = _positive(cost, "--cost")
        goal = Goal("weighted_passes", costs[-1])
    elif seconds is not None:
        costs = _positive(seconds, "--seconds")
        goal = Goal("seconds", costs[-1])
    else:
        costs, goal = (), Goal("iterations", iterations)
    _check_settings(overrides, lrs is not None, given)
    rates = [None] if lrs is None else _positive(lrs, "--lr")
    if search is not None:
        _check_search(search, costs, len(rates))
    runs = []
    for seed in _seeds(seeds):
        for rate in rates:
            for path in recipes:
                runs.append(_run(path, out, overrides, seed, rate, goal))
    _check_names(recipes)
    _check_alike(runs)
    for run in runs:
        _check_unchanged(run)
    check_judged(out, runs[0].setup)
    return Comparison(out, runs, goal, costs, search)


def _check_search(search: float, costs: tuple[float, ...], rates: int) -> None:
    """Raises UserError where there is nothing to search, or no unit to search in."""
    if not costs:
        raise UserError("--search is a cost at which learning rates are chosen: give --cost or --seconds too")
    if rates < 2:
        raise UserError("--search chooses between learning rates: give several, like --lr 1e-4,2e-4,4e-4")
    if not 0 < search <= costs[-1]:
        raise UserError(f"--search is {search:,g}: write a number above 0 and at most {costs[-1]:,g}, where runs end")


def _check_settings(overrides: tuple[str, ...], rates: bool, given: list[str]) -> None:
    """Raises UserError for a setting of what an option decides."""
    taken = {"run.seed": "--seeds"}
    if rates:
        taken["update.lr"] = "--lr"
    if given:
        taken["run.iterations"] = given[0]
    for setting in overrides:
        key = setting.partition("=")[0].strip()
        if key in taken:
            raise UserError(f"--set {setting} would change nothing, as {taken[key]} says it: give {taken[key]} alone")


def _run(path: Path, out: Path, overrides: tuple[str, ...], seed: int, rate: float | None, goal: Goal) -> Run:
    own = (f"run.seed={seed}", *(() if rate is None else (f"update.lr={rate!r}",)))
    if goal.unit == "iterations" and goal.amount is not None:
        own = (*own, f"run.iterations={int(goal.amount)}")
    recipe = load_recipe(path, (*overrides, *own))
    if recipe.update.lr_schedule == "cosine" and goal.unit != "iterations":
        raise UserError(
            f"{path}: update.lr_schedule cosine needs the length of a run beforehand: give --iterations instead of "
            f"--{'cost' if goal.unit == 'weighted_passes' else 'seconds'}, or --set update.lr_schedule=constant"
        )
    if recipe.data.eval_prompts is None or not recipe.run.eval_every:
        key = "data.eval_prompts" if recipe.data.eval_prompts is None else "run.eval_every"
        raise UserError(f"{path} has no {key}: recipes are compared by their held-out reward")
    lr = recipe.update.lr
    return Run(path.stem, lr, seed, Setup(recipe), out / "runs" / f"{path.stem}-lr{rate_text(lr)}-seed{seed}")


def _check_names(recipes: list[Path]) -> None:
    stems = [path.stem for path in recipes]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"two recipes are named {stem}: give each once, or one of them another name")


def _check_alike(runs: list[Run]) -> None:
    """Raises UserError where recipes are not judged by the same rewards of the same pictures of the same model."""
    each = {run.name: run for run in runs}
    first, *others = each.values()
    here = judged(first.setup)
    for other in others:
        for key, told in judged(other.setup).items():
            if told != here[key]:
                raise UserError(
                    f"{first.name} and {other.name} have another {key}: what they reach is comparable where the same "
                    "rewards judge the same held-out prompts, drawn in the same way by the same model"
                )


def _check_unchanged(run: Run) -> None:
    """Raises UserError if the run's folder holds one of another recipe. One without a checkpoint begins anew."""
    checkpoints = valid_checkpoints(run.folder)
    if not checkpoints:
        return
    try:
        same = run.setup.is_of(read_state(checkpoints[-1])["recipe"])
    except DamagedError:
        return  # an older one may do; whoever goes on will say what is wrong
    if not same:
        found = differences(run.setup.recipe, run.folder)
        raise UserError(
            f"{run.folder} holds a run of another recipe: {phrase(found)}: give another --out, or remove that folder"
        )


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and int(word[:11]) < 2**32 for word in words):
        raise UserError(f"--seeds is {text!r}: write numbers like 1,2,3, each below 2³²")
    found = [int(word) for word in words]
    if len(set(found)) < len(found):
        raise UserError(f"--seeds is {text!r}: name every seed once")
    return found


def _positive(text: str, option: str) -> tuple[float, ...]:
    """The numbers of a list with commas, the smallest first."""
    try:
        found = sorted(float(word) for word in text.split(","))
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found) or len(set(found)) < len(found):
        example = "1e-4,2e-4" if option == "--lr" else "200000,400000"
        raise UserError(f"{option} is {text!r}: write numbers above 0, each once, like {example}")
    return tuple(found)


def rate_text(lr: float) -> str:
    """A learning rate, short, and as exact as it needs to be for no other to read the same."""
    short = f"{lr:g}"
    return short if float(short) == lr else repr(lr)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
