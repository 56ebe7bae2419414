"""What the curves of a run warn of, in words, and which recipe key to change: pure functions of its metrics lines.

The latest lines (a tenth, at least 5) speak for how the run is now, the first as many for how it began, each by their
median, so that single lines are no alarm. Nothing is judged before 10 iterations.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from statistics import fmean, median, pvariance

from flowgrove.recipe.schema import Recipe
from flowgrove.report.finding import Finding
from flowgrove.report.gradient_findings import little_noise, mostly_noise, silent_steps, two_nodes
from flowgrove.report.lines import Line, evaluated_lines, told_of, total_reward

FEWEST = 10  # lines before anything is judged


def find(recipe: Recipe, lines: list[Line], changed: bool = False) -> list[Finding]:
    """All findings of a run, warnings first. `changed`: whether its evaluations are of other prompts than at first, so
    that their rewards do not compare.
    """
    if len(lines) < FEWEST:
        return []
    looks = [look for look in _LOOKS if not (changed and look in (held_out_falls, others_fall))]
    found = [finding for look in looks if (finding := look(recipe, lines)) is not None]
    return sorted(found, key=lambda finding: finding.kind != "warning")


def held_out_falls(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """The last held-out reward lies below the best one by more than both confidence intervals allow (the root of the
    sum of their squares; of runs that have none, three times the usual step between evaluations). Whether the training
    reward still rises meanwhile (by two standard errors between the halves of what came after the best) tells
    overfitting from collapse.
    """
    held_out = evaluated_lines(lines, recipe.run.iterations)
    if len(held_out) < 3:
        return None
    rewards = [line["eval_reward"] for _, line in held_out]
    best = rewards.index(max(rewards))
    told = [line.get("eval_reward_confidence") for _, line in held_out]
    margin = sum((told[place] or 0) ** 2 for place in (best, -1)) ** 0.5
    if not any(told) or told[best] is None or told[-1] is None:  # older lines, or a single prompt
        margin = max(margin, 3 * median(abs(after - before) for before, after in pairwise(rewards)))
    if rewards[best] - rewards[-1] <= margin:
        return None
    done = held_out[best][0]
    fall = (
        f"The held-out reward was {rewards[best]:.4g} after {done} iterations and is {rewards[-1]:.4g} now, a fall "
        f"beyond its uncertainty ({margin:.2g})."
    )
    since = [total_reward(recipe, line) for line in lines if line["iteration"] >= done]
    if _rises(since):
        return Finding(
            "overfitting", "warning", "eval_reward", "The reward rises while the held-out reward falls",
            f"{fall} The reward on training prompts went on rising: the model learns the training prompts or the "
            "noise, or it exploits the reward.",
            "Go back to the best checkpoint (run.keep_best keeps it). Then take more prompts (data.prompts, "
            "data.prompts_per_iteration), set update.kl_weight, or end earlier (run.iterations).",
        )  # fmt: skip
    return Finding(
        "collapse", "warning", "eval_reward", "The held-out reward falls",
        f"{fall} The reward on training prompts does not rise either: updates are too large or too noisy.",
        "Go back to the best checkpoint (run.keep_best keeps it) and lower update.lr, or raise rollout.group_size.",
    )  # fmt: skip


def others_fall(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """A reward that only evaluations give has fallen, by more than both confidence intervals allow, while eval_reward
    has risen.
    """
    held_out = evaluated_lines(lines, recipe.run.iterations)
    fallen = []
    for reward in recipe.run.eval.rewards:
        told = [
            (done, found)
            for done, line in held_out
            if (found := told_of(reward, line.get("eval_rewards") or {})) is not None
        ]
        if len(told) < 3 or held_out[-1][1]["eval_reward"] <= held_out[0][1]["eval_reward"]:
            continue
        done, best = max(told, key=lambda each: each[1]["mean"])
        last = told[-1][1]
        if best["mean"] - last["mean"] > (best["confidence"] ** 2 + last["confidence"] ** 2) ** 0.5:
            fallen.append(
                f"{reward.title} was {best['mean']:.4g} after {done} iterations and is {last['mean']:.4g} now"
            )
    if not fallen:
        return None
    return Finding(
        "hacked", "warning", "eval_rewards", "A reward that nothing trains on falls",
        f"{'; '.join(fallen)}, beyond its uncertainty, while what is trained on has risen: the model has begun to "
        "exploit its reward.",
        "Look at the pictures. Go back to an earlier checkpoint, set update.kl_weight, add that reward to reward, or "
        "draw with run.eval.tuned_share 0.8.",
    )  # fmt: skip


def ratio_drifts(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """The mean ratio lies further from 1 than the clip range."""
    low, high = clip_range(recipe)
    ratio = _late(line["ratio_mean"] for line in lines)
    if ratio is None or 1 - low <= ratio <= 1 + high:
        return None
    return Finding(
        "ratio", "warning", "ratio_mean", "The policy ratio drifts",
        f"Its mean is 1 {'−' if ratio < 1 else '+'} {abs(ratio - 1):.2g}, outside the clip range of 1 − {low:g} to "
        f"1 + {high:g}: most edges have left the region in which the rollout says something about the new policy.",
        f"Lower update.lr, or {_fewer_updates(recipe)}.",
    )  # fmt: skip


def _fewer_updates(recipe: Recipe) -> str:
    """The key that makes an iteration's updates fewer."""
    drawn = recipe.update.edges_per_update is not None
    return "raise update.edges_per_update" if drawn else "lower update.updates_per_iteration"


def mostly_clipped(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """More than a third of the trained edges is clipped on one side, or more than half on both."""
    low, high = (_late(line[key] for line in lines) or 0 for key in ("clipped_low", "clipped_high"))
    if max(low, high) <= 1 / 3 and low + high <= 1 / 2:
        return None
    return Finding(
        "clipped", "warning", "clipped_low", "Many trained edges are clipped",
        f"{low:.0%} of the ratios lie below the clip range and {high:.0%} above it: passes are computed whose edges "
        "train nothing.",
        f"Raise update.clip_range, lower update.lr, or {_fewer_updates(recipe)}.",
    )  # fmt: skip


def without_spread(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """Half of the latest iterations trained nothing, or half of their prompts, or the advantages have fallen below 0.4
    of what they were, or the standard deviation of every reward below a tenth.
    """
    late = lines[-_some(lines) :]
    idle = sum(line["train_passes"] == 0 for line in late)
    strengths = [_strength(line) for line in lines]
    was, now = _early(strengths) or 0, _late(strengths) or 0
    spreads = [[told_of(reward, line["reward"])["std"] for line in lines] for reward in recipe.reward]
    alike = all((_late(spread) or 0) < 0.1 * (_early(spread) or 0) for spread in spreads)
    if 2 * idle > len(late):
        seen = f"{idle} of the latest {len(late)} iterations trained nothing, as no group had a difference in reward."
    elif (same := _late(line.get("zero_std_ratio") for line in lines)) is not None and 2 * same > 1:
        seen = f"Of the latest iterations' prompts {same:.0%} have samples that all score alike, and so no advantage."
    elif now < 0.4 * was:
        seen = f"The mean |advantage| was {was:.2f} in the beginning and is {now:.2f}: in many groups all score alike."
    elif alike:
        seen = "The standard deviation of the reward is below a tenth of what it was: advantages are mostly noise."
    else:
        return None
    return Finding(
        "spread", "warning", "advantage_by_step", "Groups without spread",
        f"{seen} Where the samples of a prompt score alike there is nothing to prefer.",
        "Raise rollout.noise_level or rollout.group_size, take harder prompts, or a reward with finer steps; "
        "update.kl_weight keeps the samples from becoming the same picture.",
    )  # fmt: skip


def kl_runs_away(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """approx_kl is ten times what it was, and more than twenty times half the square of the clip range, where ratios
    lie some four ranges from 1. Below that the window alone moves it a hundredfold, as late steps have less noise.
    """
    was, now = (side(line.get("approx_kl") for line in lines) for side in (_early, _late))
    usual = max(clip_range(recipe)) ** 2 / 2
    if was is None or now is None or now <= 20 * usual or now <= 10 * was:
        return None
    return Finding(
        "kl", "warning", "approx_kl", "The divergence runs away",
        f"approx_kl has grown from {was:.1e} to {now:.1e}, where {usual:.0e} is usual for this clip range: every "
        "iteration changes the policy more than the one before.",
        "Lower update.lr, and look at the pictures: this comes before the reward shows it.",
    )  # fmt: skip


def drifts_at_once(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """In fp32 the log-probabilities of the first update differ from the rollout's by more than the clip range."""
    drift = _late(line.get("logp_drift") for line in lines)
    if recipe.model.dtype != "fp32" or drift is None or drift <= max(clip_range(recipe)):
        return None
    return Finding(
        "drift", "warning", "ratio_mean", "Rollout and training do not compute the same",
        f"Before the first update the log-probabilities differ by {drift:.1e} already, more than the clip range.",
        "Set engine.exact_replay: true; then try engine.backend: reference, engine.compile: false and "
        "engine.attention: sdpa in turn: what makes logp_drift vanish is at fault.",
    )  # fmt: skip


def often_skipped(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """Updates were skipped in more than a tenth of the iterations."""
    skipped = sum(bool(line.get("skipped_updates")) for line in lines)
    if skipped <= len(lines) / 10:
        return None
    return Finding(
        "skipped", "warning", "skipped_updates", "Updates are skipped",
        f"In {skipped} of {len(lines)} iterations a gradient was not finite.",
        "Lower update.lr, or set model.dtype: fp32.",
    )  # fmt: skip


def often_dropped(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """More than one in twenty prompts was dropped."""
    dropped, prompts = sum(line.get("dropped_prompts") or 0 for line in lines), recipe.data.prompts_per_iteration
    if dropped <= len(lines) * prompts / 20:
        return None
    return Finding(
        "dropped", "warning", "dropped_prompts", "Prompts are dropped",
        f"{dropped} of {len(lines) * prompts} prompts could not be scored, and trained nothing.",
        "The log names the reason. Of a reward behind a url lower the concurrency, or raise timeout and retries; where "
        "pictures are not finite, lower update.lr.",
    )  # fmt: skip


def saturated(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """The reward has risen, its last quarter lies above the quarter before by less than a twentieth of the rise, and
    its standard deviation is below 0.4 of what it was.
    """
    rewards = [total_reward(recipe, line) for line in lines]
    quarter = len(rewards) // 4
    if quarter < FEWEST:
        return None
    rise = fmean(rewards[-quarter:]) - fmean(rewards[:quarter])
    gain = fmean(rewards[-quarter:]) - fmean(rewards[-2 * quarter : -quarter])
    spreads = [[told_of(reward, line["reward"])["std"] for line in lines] for reward in recipe.reward]
    left = [(_late(spread) or 0) / first for spread in spreads if (first := _early(spread))]
    if not _rises(rewards) or gain > rise / 20 or not left or max(left) >= 0.4:
        return None
    return Finding(
        "saturated", "note", "reward", "The reward is saturated",
        f"It rose by {rise:.3g} and has stopped, and samples differ {max(left):.0%} as much as in the beginning: most "
        "of them reach what the reward can tell.",
        "End here (run.iterations), take harder prompts (data.prompts), or add a second reward.",
    )  # fmt: skip


def clip_range(recipe: Recipe) -> tuple[float, float]:
    """(ε_low, ε_high)."""
    clip = recipe.update.clip_range
    return clip if isinstance(clip, tuple) else (clip, clip)


_LOOKS: tuple[Callable[[Recipe, list[Line]], Finding | None], ...] = (
    held_out_falls, others_fall, kl_runs_away, ratio_drifts, mostly_clipped, without_spread, drifts_at_once,
    often_skipped, often_dropped, mostly_noise, silent_steps, two_nodes, little_noise, saturated,
)  # fmt: skip


def _some(lines: list[Line] | list[float | None]) -> int:
    return max(5, len(lines) // 10)


def _early(values: Iterable[float | None]) -> float | None:
    whole = list(values)
    return _median(whole[: _some(whole)])


def _late(values: Iterable[float | None]) -> float | None:
    whole = list(values)
    return _median(whole[-_some(whole) :])


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _strength(line: Line) -> float | None:
    """The mean |advantage| over all steps that train; None where nothing does."""
    values = list(line.get("advantage_by_step", {}).values())
    return fmean(values) if values else None


def _rises(values: list[float]) -> bool:
    """Whether the second half lies above the first by two standard errors."""
    half = len(values) // 2
    if half < 3:
        return False
    first, second = values[:half], values[half:]
    error = (pvariance(first) / len(first) + pvariance(second) / len(second)) ** 0.5
    return fmean(second) - fmean(first) > 2 * error
