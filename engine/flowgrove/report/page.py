"""The report of a run: reward curve, ratios, and the same prompts and seeds before and after,
as PNGs and one HTML page.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.recipe.schema import Recipe
from flowgrove.report.figures import literal, pyplot, save_figure
from flowgrove.report.grids import Grid, grid_files, in_common, load_grid
from flowgrove.report.side_by_side import draw_side_by_side
from flowgrove.run.metric_keys import find_metric
from flowgrove.run.metrics import read_metrics

# the metric whose healthy values stand below a plot
_CAPTIONS = {
    "reward.png": "eval_reward",
    "ratio.png": "ratio_mean",
    "clipped.png": "clipped_low",
    "advantage.png": "advantage_by_step",
}
_TRAIN, _HELD_OUT, _MUTED = "#8fa8c8", "#1f4e8c", "#666666"


def write_report(recipe: Recipe, out: Path) -> Path:
    """Writes reward.png, ratio.png, before_after.png (with held-out prompts) and report.html into the run folder;
    returns the page.

    Raises UserError if metrics.jsonl holds no line of this recipe.
    """
    lines = [line for line in read_metrics(out) if _is_whole(line, recipe)]
    if not lines:
        log = out / "metrics.jsonl"
        raise UserError(f"{log} holds no line of this recipe: give the folder of a run that has trained")
    plots = {
        "Reward": "reward.png",
        "Policy ratio": "ratio.png",
        "Clipped edges": "clipped.png",
        "Advantage by step": "advantage.png",
    }
    _reward_curve(lines, recipe, out / "reward.png")
    if len(recipe.reward) > 1:
        plots = {"Reward": "reward.png", "Each reward": "rewards.png", **plots}
        _each_reward(lines, recipe, out / "rewards.png")
    trained = [line for line in lines if line["ratio_mean"] is not None]
    _ratio_plot(trained, recipe, out / "ratio.png")
    _clip_plot(trained, out / "clipped.png")
    _advantage_plot(trained, recipe, out / "advantage.png")
    grids = _grids(out)
    comparison = _compare(grids, out / "before_after.png")
    page = Environment(loader=PackageLoader("flowgrove.report"), autoescape=True).get_template("report.html.j2")
    text = page.render(
        name=out.name, facts=_facts(recipe, lines, _prompts_changed(grids)), plots=plots, before_after=comparison,
        captions={file: find_metric(key).healthy for file, key in _CAPTIONS.items()},
        recipe=(out / "recipe.yaml").read_text(encoding="utf-8"),
    )  # fmt: skip
    write_text(out / "report.html", text)
    return out / "report.html"


def _grids(out: Path) -> list[tuple[int, Grid]]:
    """The first and the last of a run, with the iterations before them; pictures of another kind are passed over."""
    found = []
    for done, path in grid_files(out).items():
        with suppress(ValueError):
            found.append((done, load_grid(path)))
    return [found[0], found[-1]] if len(found) > 1 else []


def _prompts_changed(grids: list[tuple[int, Grid]]) -> bool:
    """Whether the held-out prompts of the first evaluation were others than those of the last."""
    return bool(grids) and grids[0][1].prompts != grids[1][1].prompts


def _compare(grids: list[tuple[int, Grid]], path: Path) -> bool:
    """Draws what the grids show of the same prompts and seeds; whether there is anything."""
    common = in_common(grids[0][1], grids[1][1]) if grids else None
    if common is None:
        path.unlink(missing_ok=True)  # of an earlier report
        return False
    before, after = common
    first, last = (f"after {done} iterations" if done else "base model" for done, _ in grids)
    names = (f"{first} · {before.scores.mean():.2f}", f"{last} · {after.scores.mean():.2f}")
    draw_side_by_side(before, after, names, path)
    return True


def _is_whole(line: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a line has what the report draws: it may come from another program or another recipe."""
    optional = ("ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high")  # null where nothing was trained
    seconds, rewards, steps = line.get("seconds"), line.get("reward"), line.get("advantage_by_step", {})
    if not (isinstance(seconds, dict) and isinstance(rewards, dict) and isinstance(steps, dict)):
        return False
    ratios = [line.get(key) for key in optional]
    numbers = [line.get(key) for key in ("rollout_forwards", "train_passes", "peak_memory_bytes")]
    numbers += [*seconds.values(), *steps.values()]
    for reward in recipe.reward:
        told = rewards.get(reward.name)
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


def evaluations(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(completed iterations, held-out reward):
    a line's evaluation comes before its update, the last line's after it.
    """
    found = [(line["iteration"], line["eval_reward"]) for line in lines if line.get("eval_reward") is not None]
    if len(found) > 1 and lines[-1].get("eval_reward") is not None:
        found[-1] = (found[-1][0] + 1, found[-1][1])
    return found


def _facts(recipe: Recipe, lines: list[dict[str, Any]], prompts_changed: bool) -> dict[str, str]:
    held_out = evaluations(lines)
    last = lines[-1]
    changed = " (the held-out prompts changed in between)" if prompts_changed else ""
    return {
        "iterations": f"{len(lines)}",
        "held-out reward": f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}{changed}" if held_out else "not evaluated",
        "training reward": f"{_total(recipe, lines[0]):.3f} → {_total(recipe, last):.3f}",
        "seconds per iteration": f"{sum(sum(line['seconds'].values()) for line in lines) / len(lines):.2f}",
        "rollout forwards, train passes": f"{last['rollout_forwards']:,}, {last['train_passes']:,} per iteration",
        "peak memory": f"{max(line['peak_memory_bytes'] for line in lines) / 2**30:.2f} GiB",
    }


def _total(recipe: Recipe, line: dict[str, Any]) -> float:
    return sum(reward.weight * line["reward"][reward.name]["mean"] for reward in recipe.reward)


def _reward_curve(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(
        [line["iteration"] for line in lines],
        [_total(recipe, line) for line in lines],
        color=_TRAIN,
        label="training prompts, with exploration noise",
    )
    held_out = evaluations(lines)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", label="held-out prompts, fixed seeds")
        for place in {0, len(held_out) - 1}:
            above = place > 0
            axes.annotate(
                f"{held_out[place][1]:.3f}",
                held_out[place],
                (0, 8 if above else -14),
                textcoords="offset points",
                ha="center",
                color=_HELD_OUT,
            )
    axes.set(xlabel="iteration")
    axes.set_ylabel(**literal(" + ".join(reward.name for reward in recipe.reward), "ylabel"))
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower right")
    _finish(figure, axes, path)


def _each_reward(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """One panel per reward, each on its own scale:
    mean over an iteration's samples, and one standard deviation around it.
    """
    count = len(recipe.reward)
    figure, panels = pyplot.subplots(
        count, 1, figsize=(7, 1.2 + 1.8 * count), layout="constrained", sharex=True, squeeze=False
    )
    figure.suptitle(
        "mean over an iteration's samples; band: one standard deviation around it", fontsize=9, color=_MUTED
    )
    x = [line["iteration"] for line in lines]
    for axes, reward in zip(panels[:, 0], recipe.reward, strict=True):
        mean, std = ([line["reward"][reward.name][key] for line in lines] for key in ("mean", "std"))
        axes.fill_between(
            x,
            [m - s for m, s in zip(mean, std, strict=True)],
            [m + s for m, s in zip(mean, std, strict=True)],
            color=_TRAIN,
            alpha=0.3,
            lw=0,
        )
        axes.plot(x, mean, color=_HELD_OUT)
        axes.set_ylabel(**literal(f"{reward.name} (weight {reward.weight:g})", "ylabel"))
        _tidy(axes)
    panels[-1, 0].set(xlabel="iteration")
    save_figure(figure, path)


def _ratio_plot(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    clip = recipe.update.clip_range
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    x = [line["iteration"] for line in lines]
    axes.fill_between(
        x,
        [line["ratio_min"] - 1 for line in lines],
        [line["ratio_max"] - 1 for line in lines],
        color=_TRAIN,
        alpha=0.4,
        lw=0,
        label="min … max",
    )
    axes.plot(x, [line["ratio_mean"] - 1 for line in lines], color=_HELD_OUT, label="mean")
    for bound in (-low, high):
        axes.axhline(bound, color=_MUTED, lw=0.8, ls="--", label="clip range" if bound > 0 else None)
    axes.set(xlabel="iteration", ylabel="ratio − 1")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes.legend(frameon=False, loc="upper left")
    _finish(figure, axes, path)


def _clip_plot(lines: list[dict[str, Any]], path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    x = [line["iteration"] for line in lines]
    axes.plot(x, [100 * line["clipped_high"] for line in lines], color=_HELD_OUT, label="ratio above the range")
    axes.plot(x, [100 * line["clipped_low"] for line in lines], color=_TRAIN, label="ratio below the range")
    axes.set(xlabel="iteration", ylabel="% of trained edges")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")
    _finish(figure, axes, path)


def _advantage_plot(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """How strong the signal is at each depth of the forest, over all iterations that trained there."""
    found: dict[int, list[float]] = {}
    for line in lines:
        for step, value in line.get("advantage_by_step", {}).items():
            found.setdefault(int(step), []).append(value)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.bar(list(found), [sum(values) / len(values) for values in found.values()], color=_TRAIN, width=0.7)
    axes.set(
        xlabel="step of the schedule",
        ylabel="mean |advantage| of trained edges",
        xlim=(-0.6, recipe.rollout.steps - 0.4),
    )
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Axes, path: Path) -> None:
    _tidy(axes)
    save_figure(figure, path)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
