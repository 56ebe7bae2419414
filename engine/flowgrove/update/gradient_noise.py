"""Signal and noise of an iteration's gradient (`run.gradient_noise_every`): the gradients of every trained step, of
groups of prompts and of halves of their leaves, each from passes of its own before the updates.

Nothing of the run changes by it: weights, graphs of the rollout, the size of the run's passes and the optimiser's state
are left as they are. Where memory is full, it takes smaller passes, or is given up. Only where ranks have divided the
weights a full memory ends the run in it, as in an update.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrove.credit import EdgeCredit
from flowgrove.device import is_out_of_memory, to_host
from flowgrove.passes.budget import PassBudget
from flowgrove.passes.out_of_memory import FORGET_RECORDINGS, HALVE_PASSES, Shrink, retry_smaller
from flowgrove.passes.packing import Ints
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.spans import span
from flowgrove.update.edges import rows_of_step
from flowgrove.update.micro_batches import MicroBatch, micro_batches
from flowgrove.update.noise_estimates import MOST_GROUPS, estimate, halves, product
from flowgrove.update.passes import Rolled, step_weights
from flowgrove.update.sketch import Sketch
from flowgrove.update.updater import Updater

_FEWEST_NODES = 4  # two a half: of a single one the advantage says only which half is better
Take = Callable[[], Tensor]
_log = logging.getLogger("flowgrove")


class Groups(NamedTuple):
    """`of`: the group of every prompt of the iteration, −1 where it has no score; `prompts`: how many each has."""

    of: Ints
    prompts: Ints

    @classmethod
    def among(cls, scored: NDArray[np.bool_]) -> "Groups":
        """In turn, so that every group has prompts of all sizes; as many groups as prompts, at most MOST_GROUPS."""
        count = int(scored.sum())
        groups = min(count, MOST_GROUPS)
        of = np.full(len(scored), -1)
        of[scored] = np.arange(count) % max(1, groups)
        return cls(of, np.bincount(of[scored], minlength=groups))


def gradient_noise(
    updater: Updater, plan: RolloutPlan, parts: list[Rolled], credit: dict[int, EdgeCredit], scored: NDArray[np.bool_]
) -> dict[str, Any]:
    """What a metrics line tells of it. `parts`: this rank's; `credit`, `scored`: of all prompts of the iteration.
    Empty where fewer than two prompts are scored, nothing trains, or memory has no room for it on some rank.
    """
    groups = Groups.among(scored)
    selected = sum(int(edges.trains.sum()) for edges in credit.values())
    if len(groups.prompts) < 2 or not selected:
        return {}
    recipe, weights, ranks = updater.recipe, updater.weights, updater.ranks
    scale = int(scored.sum()) / selected  # the gradient is the mean over prompts
    budget = updater.runner.budget.apart("in this measurement of the gradient's noise")

    def work() -> tuple[Tensor, int]:
        sketch = Sketch(
            f"gradient/{recipe.run.seed}/{plan.iteration}", updater.policy.device, updater.policy.state_dtype
        )
        return group_gradients(
            updater, plan, parts, groups, scale, sketch.buckets, lambda: sketch(weights.own_gradients()), budget
        )

    if weights.sharded:
        weights.meet()
        measured: tuple[Tensor, int] | None = work()
    else:
        measured = ranks.together(lambda: _where_it_fits(updater, work, budget))
        if ranks.most(int(measured is None)):
            if ranks.first:
                _log.warning(
                    "no room to measure the gradient's noise in iteration %d, and the run goes on: the GPU's memory is "
                    "full even in passes of one row (run.gradient_noise_every)",
                    plan.iteration,
                )
            return {}
    if measured is None:
        return {}
    mine, passes = measured
    found = ranks.sum(to_host(mine)).double().numpy()
    return summary(plan, found, groups.prompts) | {"gradient_passes": ranks.total(passes)}


def _where_it_fits(
    updater: Updater, work: Callable[[], tuple[Tensor, int]], budget: PassBudget
) -> tuple[Tensor, int] | None:
    """What `work` returns, in passes of `budget` that are halved until they fit; None: not one row does. The rollout's
    graphs stay.
    """
    try:
        return retry_smaller(work, Shrink({FORGET_RECORDINGS: updater.runner.forget, HALVE_PASSES: budget.halve}))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    updater.weights.drop_gradients()
    return None


def group_gradients(
    updater: Updater,
    plan: RolloutPlan,
    parts: list[Rolled],
    groups: Groups,
    scale: float,
    length: int,
    take: Take,
    budget: PassBudget | None = None,
) -> tuple[Tensor, int]:
    """[trained steps, groups, 2, length]: the sums over each group's prompts of what `take` makes of the gradient, by
    half of the leaves, and the rows whose backward ran. Edges count `scale` times their step's weight. Steps that have
    no halves have their whole gradient in the first. `budget`: how large passes are; None: as the run's.
    """
    budget = budget or updater.runner.budget
    policy, boundary = updater.policy, half_of_leaves(plan)
    found = torch.zeros(
        len(plan.trained_steps), len(groups.prompts), 2, length, dtype=policy.state_dtype, device=policy.device
    )
    weights = [step_weights(part.forest.plan, updater.recipe.update.step_weight) for part in parts]
    rows = 0
    for place, step in enumerate(plan.trained_steps):
        later = np.arange(step.nodes_out) * plan.width(step) >= boundary
        sides = (~later, later) if has_halves(plan, step) else (np.ones_like(later),)
        with span(f"step {step.index}"):
            for group in range(len(groups.prompts)):
                for half, nodes in enumerate(sides):
                    passes = [
                        (part, batch)
                        for part, weight in zip(parts, weights, strict=True)
                        for batch in _passes(
                            updater, part, step, groups.of == group, nodes, scale * weight[step.index], budget
                        )
                    ]
                    if passes or updater.weights.sharded:
                        rows += updater.gradient(passes)
                        found[place, group, half] = take()
    updater.weights.drop_gradients()
    return found, rows


def summary(plan: RolloutPlan, found: NDArray[np.float64], prompts: Ints) -> dict[str, Any]:
    """The keys of a metrics line from what `group_gradients` has found: of all steps together under "all", and of each
    step. None: the estimates leave it undefined.
    """
    counts, steps = prompts.astype(np.float64), plan.trained_steps
    by_step = dict(zip((str(step.index) for step in steps), found.sum(2), strict=True))
    sums = {"all": found.sum((0, 2)), **by_step}
    estimates = {key: estimate(one, counts) for key, one in sums.items()}
    halved = [place for place, step in enumerate(steps) if has_halves(plan, step)]
    share = half_of_leaves(plan) / plan.leaves
    parts = {"all": found[halved].sum(0), **{str(steps[place].index): found[place] for place in halved}}
    compared = {key: halves(one[:, 0], one[:, 1], counts, share) for key, one in parts.items()} if halved else {}
    return {
        "gradient_snr": {key: _ratio(counts.sum() * one.signal, one.noise) for key, one in estimates.items()},
        "gradient_snr_error": {key: _number(one.snr_error) for key, one in estimates.items()},
        "gradient_signal": {key: _number(one.signal) for key, one in estimates.items()},
        "gradient_signal_error": {key: _number(one.error) for key, one in estimates.items()},
        "gradient_noise": {key: _number(one.noise) for key, one in estimates.items()},
        "gradient_noise_scale": {key: _ratio(one.noise, one.signal) for key, one in estimates.items()},
        "gradient_part": {key: _number(product(one, sums["all"], counts)) for key, one in by_step.items()},
        "gradient_cosine": {key: _number(one.cosine) for key, one in compared.items()},
        "gradient_leaf_share": {key: _number(one.leaf_share) for key, one in compared.items()},
    }


def half_of_leaves(plan: RolloutPlan) -> int:
    """How many leaves the first half has: whole subtrees of the first split; 0: nothing splits."""
    nodes = next((count for count in (plan.roots, *(step.nodes_out for step in plan.steps)) if count > 1), 1)
    return nodes // 2 * (plan.leaves // nodes)


def has_halves(plan: RolloutPlan, step: Step) -> bool:
    """Whether both halves of the leaves have two nodes of a step at least."""
    return step.nodes_out >= _FEWEST_NODES and half_of_leaves(plan) > 0


def _passes(
    updater: Updater,
    part: Rolled,
    step: Step,
    prompts: NDArray[np.bool_],
    nodes: NDArray[np.bool_],
    weight: float,
    budget: PassBudget,
) -> list[MicroBatch]:
    """The passes of the edges of a step into some `nodes` of some `prompts` of the iteration, each of this `weight`.
    Graphs of the rollout stay for the updates.
    """
    recipe, forest, credit = updater.recipe, part.forest, part.credit[step.index]
    mine = credit.trains & prompts[part.first_prompt : part.first_prompt + forest.prompts, None] & nodes
    if recipe.update.kl_weight == 0:
        mine &= credit.advantage != 0
    edges = rows_of_step(forest, step, mine, credit.advantage, weight, "states")
    passes = budget.passes(part.prompts.tokens[edges.prompt]) if len(edges) else []
    return micro_batches(edges, forest.plan, part.coefficients, passes, [], 1.0, part.policy.state_dtype)


def _ratio(over: float, under: float) -> float | None:
    """None unless both are positive."""
    return _number(over / under) if over > 0 and under > 0 else None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
