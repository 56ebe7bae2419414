"""The curves of a run: its metrics lines as columns of numbers, of bounded length however long it was."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flowgrove.errors import UserError
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import SigmaTable, recipe_sigmas, shifted_sigmas
from flowgrove.recipe.schema import Recipe, Reward
from flowgrove.recipe.windows import pruned_depths, window_steps
from flowgrove.report.gradient import gradient_content
from flowgrove.report.lines import Line, evaluated_lines, told_of, total_reward
from flowgrove.report.split_view import splits_of

MOST_POINTS = 600  # a screen shows no more
Column = list[float | None]
_MEANS = (
    "ratio_mean", "zero_std_ratio", "clipped_low", "clipped_high", "approx_kl", "grad_norm", "rollout_forwards",
    "train_passes",
)  # fmt: skip
_LARGEST = ("ratio_max", "logp_drift", "peak_memory_bytes")
_SUMS = ("skipped_updates", "dropped_prompts")


@dataclass(frozen=True)
class Buckets:
    """Neighbouring lines that share a point of a curve: `each` of them, the last bucket perhaps fewer."""

    count: int
    each: int

    @classmethod
    def of(cls, count: int, most: int = MOST_POINTS) -> "Buckets":
        return cls(count, max(1, -(-count // most)))

    def merge(self, values: list[Any], how: Callable[[list[float]], float]) -> Column:
        """One number a bucket, of those that there are; None where there are none."""
        parts = (values[start : start + self.each] for start in range(0, self.count, self.each))
        kept = ([value for value in part if value is not None] for part in parts)
        return [rounded(how(part)) if part else None for part in kept]


def curves(recipe: Recipe, lines: list[Line]) -> dict[str, Any]:
    """What the page draws: `x` of the points (the iteration, and the stage seconds before it), `series` {metric:
    values}, `rewards`, `stages`, `advantage` by step, `unshared` passes, `held_out`, `gradient`. `every`: iterations a
    point.
    """
    buckets = Buckets.of(len(lines))
    before = seconds_before(lines)

    def column(value: Callable[[Line], Any], how: Callable[[list[float]], float] = mean) -> Column:
        return buckets.merge([value(line) for line in lines], how)

    def of(key: str, part: str | None = None) -> Callable[[Line], float | None]:
        return lambda line: _number(line.get(key) if part is None else line.get(key, {}).get(part))

    series = {key: column(of(key)) for key in _MEANS}
    series |= {key: column(of(key), max) for key in _LARGEST}
    series |= {key: column(of(key), sum) for key in _SUMS}
    series["ratio_min"] = column(of("ratio_min"), min)
    series["reward"] = column(lambda line: total_reward(recipe, line))
    stages = list(dict.fromkeys(stage for line in lines for stage in line["seconds"]))
    steps = sorted({int(step) for line in lines for step in line.get("advantage_by_step", {})})
    unshared = unshared_passes(recipe, lines)
    return {
        "every": buckets.each,
        "x": {
            "iteration": [line["iteration"] for line in lines[:: buckets.each]],
            "seconds": [rounded(seconds) for seconds in before[: len(lines) : buckets.each]],
        },
        "series": series,
        "rewards": [_of_reward(reward, column) for reward in recipe.reward],
        "eval_rewards": [reward.title for reward in recipe.run.eval.rewards],
        "stages": {stage: column(of("seconds", stage)) for stage in stages},
        "advantage": {
            "steps": steps,
            "values": [column(of("advantage_by_step", str(step))) for step in steps],
        },
        "unshared": {
            name: buckets.merge([passes[place] for passes in unshared], mean)
            for place, name in enumerate(("rollout_forwards", "train_passes"))
        }
        if unshared
        else None,
        "held_out": _held_out(recipe, lines, before),
        "gradient": gradient_content(recipe, lines, before),
    }


def seconds_before(lines: list[Line]) -> list[float]:
    """The stage seconds of all lines before each one, and of all of them: one number more than there are lines."""
    return list(accumulate((sum(line["seconds"].values()) for line in lines), initial=0.0))


def counting_table(recipe: Recipe) -> SigmaTable | None:
    """A table by which a run's steps are counted. They do not hang on σ but where one of two experts trains, whose
    steps its pipeline's boundary divides: None where that is not on this machine.
    """
    if recipe.model.trained_experts == "both":
        return shifted_sigmas(recipe.rollout.steps, 1.0)
    try:
        table = recipe_sigmas(recipe)
    except UserError:
        return None
    return None if table.boundary is None else table


def unshared_passes(recipe: Recipe, lines: Iterable[Line]) -> list[tuple[int, int]]:
    """(rollout forwards, train passes) of each line's iteration in the loop that shares nothing, for all its prompts;
    none where they cannot be counted here. They hang on where the window stands, on what is pruned and on splits that
    were chosen.
    """
    rollout, prompts = recipe.rollout, recipe.data.prompts_per_iteration
    table, known = counting_table(recipe), {}
    found: list[tuple[int, int]] = []
    if table is None:
        return found
    for line in lines:
        iteration, splits = line["iteration"], splits_of(recipe, line)
        window = window_steps(rollout.window, rollout.steps, iteration, recipe.run.seed)
        place = window, frozenset(pruned_depths(recipe.credit.prune, iteration)), splits
        if place not in known:
            counts = make_plan(recipe, iteration, table, splits).counts
            known[place] = counts.unshared_rollout_forwards * prompts, counts.unshared_train_passes * prompts
        found.append(known[place])
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def rounded(value: float) -> float:
    """To six digits, which are more than a curve shows."""
    return float(f"{value:.6g}")


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _of_reward(reward: Reward, column: Callable[..., Column]) -> dict[str, Any]:
    parts = {key: column(lambda line, key=key: told_of(reward, line["reward"])[key]) for key in ("mean", "std")}
    return {"name": reward.title, "weight": reward.weight, **parts}


def _held_out(recipe: Recipe, lines: list[Line], before: list[float]) -> dict[str, Any]:
    """The evaluations, at most as many as points; `confidence` and `rewards`, of those that train and then of
    those that only evaluations give, hold null where a line does not tell.
    """
    found = evaluated_lines(lines, recipe.run.iterations)
    chosen = [found[place] for place in spread(len(found), MOST_POINTS)]
    seconds = {line["iteration"]: before[place] for place, line in enumerate(lines)}

    def part(line: Line, reward: Reward, key: str) -> float | None:
        told = line.get("eval_rewards")
        found = told_of(reward, told) if isinstance(told, dict) else None
        return _number(found.get(key)) if isinstance(found, dict) else None

    return {
        "iteration": [done for done, _ in chosen],
        "seconds": [rounded(seconds.get(done, before[-1])) for done, _ in chosen],
        "mean": [line["eval_reward"] for _, line in chosen],
        "confidence": [_number(line.get("eval_reward_confidence")) for _, line in chosen],
        "distance": [_number(line.get("rollout_distance")) for _, line in chosen],
        "rewards": [
            {key: [part(line, reward, key) for _, line in chosen] for key in ("mean", "confidence")}
            for reward in (*recipe.reward, *recipe.run.eval.rewards)
        ],
    }


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})
