"""The metrics lines of a run as its report reads them: those of its recipe, and what they tell of the reward."""

from pathlib import Path
from typing import Any

from flowgrove.recipe.schema import Recipe, Reward
from flowgrove.run.metrics import read_metrics

Line = dict[str, Any]


def whole_lines(recipe: Recipe, folder: Path) -> list[Line]:
    """The lines of metrics.jsonl that have what a report draws; others come from another program or recipe."""
    return [line for line in read_metrics(folder) if _is_whole(line, recipe)]


def total_reward(recipe: Recipe, line: Line) -> float:
    """The weighted sum of an iteration's mean rewards."""
    return sum(reward.weight * told_of(reward, line["reward"])["mean"] for reward in recipe.reward)


def told_of(reward: Reward, told: dict[str, Any]) -> Any:
    """What a line tells of a reward: under its label or, where it had none then, its name; None: nothing."""
    return told.get(reward.title, told.get(reward.name))


def evaluated_lines(lines: list[Line], planned: int | None = None) -> list[tuple[int, Line]]:
    """(completed iterations, line) of the lines that have a held-out reward: a line's evaluation comes before its
    update, that of the last of `planned` iterations after it. None: the run has ended as planned.
    """
    last = lines[-1]["iteration"] + 1 if planned is None and lines else planned
    found = [(line["iteration"], line) for line in lines if line.get("eval_reward") is not None]
    return [(done + (done + 1 == last and len(found) > 1), line) for done, line in found]


def evaluations(lines: list[Line], planned: int | None = None) -> list[tuple[int, float]]:
    """(completed iterations, held-out reward)."""
    return [(done, line["eval_reward"]) for done, line in evaluated_lines(lines, planned)]


def _is_whole(line: Line, recipe: Recipe) -> bool:
    optional = ("ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high")  # null where nothing was trained
    seconds, rewards, steps = line.get("seconds"), line.get("reward"), line.get("advantage_by_step", {})
    if not (isinstance(seconds, dict) and isinstance(rewards, dict) and isinstance(steps, dict)):
        return False
    ratios = [line.get(key) for key in optional]
    numbers = [line.get(key) for key in ("rollout_forwards", "train_passes", "peak_memory_bytes")]
    numbers += [*seconds.values(), *steps.values()]
    for reward in recipe.reward:
        told = told_of(reward, rewards)
        if not isinstance(told, dict):
            return False
        numbers += [told.get("mean"), told.get("std")]
    if line.get("eval_reward") is not None:  # null: no held-out prompt could be scored
        numbers.append(line["eval_reward"])
    if any(value is not None for value in ratios):
        numbers += ratios
    elif not all(key in line for key in optional):
        return False
    return all(isinstance(value, int | float) for value in numbers) and all(step.isdecimal() for step in steps)
