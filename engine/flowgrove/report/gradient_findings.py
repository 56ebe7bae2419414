"""What signal and noise of the gradient warn of, where a run measures them (`run.gradient_noise_every`): why a recipe
learns slowly. Nothing is judged before 5 measurements, and only what their 95 % intervals leave no doubt of.
"""

from flowgrove.plan.planner import make_plan
from flowgrove.recipe.schema import Recipe
from flowgrove.report.finding import Finding
from flowgrove.report.gradient import (
    LATEST,
    Pooled,
    leaf_share,
    measured,
    noise_shares,
    pooled,
    pooled_steps,
)
from flowgrove.report.lines import Line
from flowgrove.report.series import counting_table
from flowgrove.report.split_view import splits_of

FEWEST = 5  # measurements before anything is judged


def mostly_noise(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """The signal to noise, at the upper end of its interval, is below one over the run's iterations. Of so many updates
    the signal adds up to their number times, the noise to its root times that of one: even their sum is mostly noise.
    """
    lines = measured(lines)[-LATEST:]
    whole, iterations = pooled(recipe, lines), recipe.run.iterations
    if whole is None or whole.measurements < FEWEST or (whole.snr + whole.interval) * iterations >= 1:
        return None
    luck = leaf_share(lines)
    leaves = luck is None or luck >= 0.5
    source = "" if luck is None else f" {luck:.0%} of the noise is the luck of the leaves and not the prompts'."
    return Finding(
        "noise", "warning", "gradient_snr", "The updates are mostly noise",
        f"With {whole.prompts:.0f} prompts the signal of the gradient is at most "
        f"{max(0.0, whole.snr + whole.interval):.2g} of its noise ({whole.measurements} measurements): the "
        f"{iterations} iterations of the run together move the weights further by chance than towards the reward."
        f"{source}",
        f"Raise {'rollout.group_size, or data.prompts_per_iteration' if leaves else 'data.prompts_per_iteration'}, or "
        "train fewer and earlier steps (rollout.window, rollout.tree.splits).",
    )  # fmt: skip


def little_noise(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """The signal to noise, at the lower end of its interval, is above 10: with half of the prompts an update would make
    more than nine tenths of the progress (1812.06162, equation 2.7).
    """
    whole = pooled(recipe, measured(lines)[-LATEST:])
    if whole is None or whole.measurements < FEWEST or whole.snr - whole.interval <= 10:
        return None
    return Finding(
        "signal", "note", "gradient_snr", "More prompts than an update needs",
        f"The signal of the gradient is {whole.snr:.2g} times its noise: {whole.prompts / whole.snr:.2g} prompts would "
        f"make them equal, and an iteration takes {whole.prompts:.0f}.",
        "Lower data.prompts_per_iteration or rollout.group_size, or raise update.lr.",
    )  # fmt: skip


def silent_steps(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """Steps that bring more than their equal part of the noise and no signal that can be told from none, while there is
    one of all steps together, or one of three standard errors at another step.
    """
    lines = measured(lines)[-LATEST:]
    whole, steps = pooled(recipe, lines), pooled_steps(recipe, lines)
    steps = {step: one for step, one in steps.items() if one.measurements >= FEWEST}
    heard = [step for step, one in steps.items() if one.signal > 3 * one.error]
    if whole is None or not (heard or whole.measurable):
        return None
    shares = noise_shares(steps)
    silent = [step for step, one in steps.items() if not one.measurable and shares[step] > 1 / len(steps)]
    if not silent:
        return None
    noise, count = sum(shares[step] for step in silent), min(steps[step].measurements for step in silent)
    best = max(steps, key=lambda step: steps[step].snr)
    earlier = min(silent) > best
    thing, key = ("splits", "rollout.tree.splits") if recipe.rollout.tree else ("the window", "rollout.window")
    less = ", or give late steps less weight (update.step_weight: tempflow)" if earlier else ""
    return Finding(
        "silent", "note", "gradient_signal", f"{_named(silent)} no signal that can be measured",
        f"{_named(silent)} {noise:.0%} of the noise and, in {count} measurements, no signal beyond doubt "
        f"({'; '.join(_told(step, steps[step]) for step in silent)}; the most has "
        f"{_told(best, steps[best])}): what happens there hardly matters to the reward, and drowns what does.",
        f"Spend their passes elsewhere: put {thing} {'in an earlier' if earlier else 'in another'} place ({key}), "
        f"leave them out (credit.prune){less}.",
    )  # fmt: skip


def two_nodes(recipe: Recipe, lines: list[Line]) -> Finding | None:
    """A depth of a tree with two nodes, whose signal to noise lies beyond doubt below the best step's. Divided by the
    spread of their own, both have one advantage whatever they score.
    """
    if recipe.rollout.tree is None or recipe.credit.std != "group" or recipe.credit.std_shrinkage:
        return None
    table = counting_table(recipe)
    if table is None:
        return None
    plan = make_plan(recipe, lines[-1]["iteration"], table, splits_of(recipe, lines[-1]))
    steps = pooled_steps(recipe, measured(lines)[-LATEST:])
    known = {step: one for step, one in steps.items() if one.measurements >= FEWEST}
    if not known:
        return None
    best = max(known, key=lambda step: known[step].snr)
    pairs = [
        step.index
        for step in plan.trained_steps
        if step.nodes_out == 2
        and step.index in known
        and known[step.index].snr + known[step.index].interval < known[best].snr - known[best].interval
    ]
    if not pairs:
        return None
    return Finding(
        "pairs", "note", "gradient_signal", "Depths of two nodes learn little",
        f"{_named(pairs)} two nodes a prompt: their advantages are opposite and of one size, however little they "
        f"differ ({'; '.join(_told(step, known[step]) for step in pairs)}; {_told(best, known[best])}).",
        "Take fewer splits with a rollout.tree.fanout of 4, or credit.std: leaves, by which a split counts by what it "
        "explains.",
    )  # fmt: skip


def _named(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"Step {steps[0]} has"
    return f"Steps {', '.join(map(str, steps[:-1]))} and {steps[-1]} have"


def _told(step: int, one: Pooled) -> str:
    return f"step {step}: {one.snr:.2g} ± {one.interval:.1g}"
