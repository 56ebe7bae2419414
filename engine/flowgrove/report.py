"""The report of a run: reward curve, ratios, and the same prompts and seeds before and after, as PNGs and one HTML page."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from flowgrove.figures import pyplot, save_figure
from flowgrove.files import write_text
from flowgrove.grids import load_grid
from flowgrove.metrics import read_metrics
from flowgrove.recipe import Recipe
from flowgrove.side_by_side import draw_side_by_side

_TRAIN, _HELD_OUT, _MUTED = "#8fa8c8", "#1f4e8c", "#666666"


def write_report(recipe: Recipe, out: Path) -> Path:
    """Writes reward.png, ratio.png, before_after.png (with held-out prompts) and report.html into the run folder; returns the page."""
    lines = read_metrics(out)
    plots = {"Reward": "reward.png", "Policy ratio": "ratio.png", "Clipped edges": "clipped.png", "Advantage by step": "advantage.png"}
    _reward_curve(lines, recipe, out / "reward.png")
    if len(recipe.reward) > 1:
        plots = {"Reward": "reward.png", "Each reward": "rewards.png", **plots}
        _each_reward(lines, recipe, out / "rewards.png")
    trained = [line for line in lines if line["ratio_mean"] is not None]
    _ratio_plot(trained, recipe, out / "ratio.png")
    _clip_plot(trained, out / "clipped.png")
    _advantage_plot(trained, recipe, out / "advantage.png")
    grids = sorted((out / "samples").glob("iteration_*.png"))
    if len(grids) > 1:
        before, after = load_grid(grids[0]), load_grid(grids[-1])
        done = int(grids[-1].stem.removeprefix("iteration_"))
        names = (f"base model · {before.scores.mean():.2f}", f"after {done} iterations · {after.scores.mean():.2f}")
        draw_side_by_side(before, after, names, out / "before_after.png")
    page = Environment(loader=PackageLoader("flowgrove"), autoescape=True).get_template("report.html.j2")
    text = page.render(
        name=out.name, facts=_facts(recipe, lines), plots=plots, before_after=len(grids) > 1,
        recipe=(out / "recipe.yaml").read_text(encoding="utf-8"),
    )  # fmt: skip
    write_text(out / "report.html", text)
    return out / "report.html"


def evaluations(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(completed iterations, held-out reward): a line's evaluation comes before its update, the last line's after it."""
    found = [(line["iteration"], line["eval_reward"]) for line in lines if "eval_reward" in line]
    if len(found) > 1 and "eval_reward" in lines[-1]:
        found[-1] = (found[-1][0] + 1, found[-1][1])
    return found


def _facts(recipe: Recipe, lines: list[dict[str, Any]]) -> dict[str, str]:
    held_out = evaluations(lines)
    last = lines[-1]
    return {
        "iterations": f"{len(lines)}",
        "held-out reward": f"{held_out[0][1]:.3f} → {held_out[-1][1]:.3f}" if held_out else "not evaluated",
        "training reward": f"{_total(recipe, lines[0]):.3f} → {_total(recipe, last):.3f}",
        "seconds per iteration": f"{sum(sum(line['seconds'].values()) for line in lines) / len(lines):.2f}",
        "rollout forwards, train passes": f"{last['rollout_forwards']:,}, {last['train_passes']:,} per iteration",
        "peak memory": f"{max(line['peak_memory_bytes'] for line in lines) / 2**30:.2f} GiB",
    }


def _total(recipe: Recipe, line: dict[str, Any]) -> float:
    return sum(reward.weight * line["reward"][reward.name]["mean"] for reward in recipe.reward)


def _reward_curve(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([line["iteration"] for line in lines], [_total(recipe, line) for line in lines], color=_TRAIN, label="training prompts, with exploration noise")
    held_out = evaluations(lines)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=_HELD_OUT, marker="o", label="held-out prompts, fixed seeds")
        for place in {0, len(held_out) - 1}:
            above = place > 0
            axes.annotate(f"{held_out[place][1]:.3f}", held_out[place], (0, 8 if above else -14), textcoords="offset points", ha="center", color=_HELD_OUT)
    axes.set(xlabel="iteration", ylabel=" + ".join(reward.name for reward in recipe.reward))
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="lower right")
    _finish(figure, axes, path)


def _each_reward(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    """One panel per reward, each on its own scale: mean over an iteration's samples, and one standard deviation around it."""
    count = len(recipe.reward)
    figure, panels = pyplot.subplots(count, 1, figsize=(7, 1.2 + 1.8 * count), layout="constrained", sharex=True, squeeze=False)
    figure.suptitle("mean over an iteration's samples; band: one standard deviation around it", fontsize=9, color=_MUTED)
    x = [line["iteration"] for line in lines]
    for axes, reward in zip(panels[:, 0], recipe.reward, strict=True):
        mean, std = ([line["reward"][reward.name][key] for line in lines] for key in ("mean", "std"))
        axes.fill_between(x, [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)], color=_TRAIN, alpha=0.3, lw=0)
        axes.plot(x, mean, color=_HELD_OUT)
        axes.set(ylabel=f"{reward.name} (weight {reward.weight:g})")
        _tidy(axes)
    panels[-1, 0].set(xlabel="iteration")
    save_figure(figure, path)


def _ratio_plot(lines: list[dict[str, Any]], recipe: Recipe, path: Path) -> None:
    clip = recipe.update.clip_range
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    x = [line["iteration"] for line in lines]
    axes.fill_between(x, [line["ratio_min"] - 1 for line in lines], [line["ratio_max"] - 1 for line in lines], color=_TRAIN, alpha=0.4, lw=0, label="min … max")
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
    axes.set(xlabel="step of the schedule", ylabel="mean |advantage| of trained edges", xlim=(-0.6, recipe.rollout.steps - 0.4))
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Axes, path: Path) -> None:
    _tidy(axes)
    save_figure(figure, path)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
