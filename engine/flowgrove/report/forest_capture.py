"""What a forest shows, taken from an iteration between its credit and its updates: nothing of the iteration changes by
it, and no pass of the model is run for it.

A step's velocity is what its own relation leaves of it: x' = a·x + b·v + s·z, and z comes back from the noise function,
so that the same step with velocity 0 gives a·x + s·z, v is the difference over b, and x̂0 = x − σ·v. That holds where
both ends of a step are kept, which is where it trains.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.models.geometry import Geometry
from flowgrove.models.runner import PassRunner
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.recipe.schema import Recipe
from flowgrove.report.forests import ForestEdges, ForestNumbers, ForestStep, PromptForest, Untrained
from flowgrove.rewards.pixels import shrink, to_bytes
from flowgrove.rewards.scoring import PIXELS_AT_ONCE
from flowgrove.rollout.forest import Forest, nodes_at
from flowgrove.update.passes import Rolled, Whole, step_weights
from flowgrove_kernels import NoiseKey, clean_estimate, flow_step

MOST_LEAVES = 256  # of a group that is drawn
_MOST_PICTURES = 64  # of leaves, and as many of inner nodes
_MOST_VIDEOS = 4  # of leaves, and none of inner nodes: one frame of each is shown, but all are decoded
_LONGEST_SIDE = 128


@torch.no_grad()
def capture_forest(
    recipe: Recipe, runner: PassRunner, parts: list[Rolled], scores: Tensor, whole: Whole
) -> PromptForest | None:
    """The forest of the first prompt of the iteration that has been scored and that this rank holds; None if there is
    none, or if its group has more than 256 leaves.

    parts: this rank's prompts; scores: float64 [leaves of all prompts, rewards], on the CPU; whole: the updates.
    """
    plan = whole.plan
    scored = scores.view(-1, plan.leaves * scores.shape[1]).isfinite().all(1)
    held = ((part, prompt) for part in parts for prompt in range(len(part.prompts)))
    found = next(((part, prompt) for part, prompt in held if scored[part.first_prompt + prompt]), None)
    if found is None or plan.leaves > MOST_LEAVES:
        return None
    part, prompt = found
    number = part.first_prompt + prompt
    numbers = _numbers(recipe, part, prompt, scores.view(-1, plan.leaves, scores.shape[1])[number], whole)
    return PromptForest(numbers, dict(_pictures(recipe, runner, part, prompt)))


def most_decoded(geometry: Geometry) -> tuple[int, int]:
    """How many leaves and how many inner nodes of this size are decoded."""
    fit = PIXELS_AT_ONCE // geometry.pixels
    if geometry.frames is not None:
        return max(1, min(_MOST_VIDEOS, fit)), 0
    return max(1, min(_MOST_PICTURES, fit // 2)), min(_MOST_PICTURES, fit // 2)


def clean_estimates(part: Rolled, seed: int, step: Step, prompt: int) -> Tensor:
    """x̂0 [nodes_in, ...] of a prompt's states before a step that trains, in the states' dtype."""
    forest, plan = part.forest, part.forest.plan
    x, x_next = (_of_prompt(forest, forest.states, level, prompt) for level in (step.index, step.index + 1))
    node = torch.arange(step.nodes_in, device=x.device)
    key = NoiseKey(seed, plan.iteration, step.index, part.first_prompt + prompt, node * step.fanout, node)
    row = part.coefficients[torch.full_like(node, step.index)]
    still, _ = flow_step(x, torch.zeros_like(x), row, key=key, sibling_correlation=plan.sibling_correlation)
    v_coef = row.v_coef.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return clean_estimate(x, (x_next[:: step.fanout] - still) / v_coef, step.sigma)


def _of_prompt(forest: Forest, column: Tensor, level: int, prompt: int) -> Tensor:
    count = nodes_at(forest.plan, level)
    first = forest.first_row[level] + prompt * count
    return column[first : first + count]


def _numbers(recipe: Recipe, part: Rolled, prompt: int, scores: Tensor, whole: Whole) -> ForestNumbers:
    plan, rewards = part.forest.plan, [(reward.title, reward.weight) for reward in recipe.reward]
    return ForestNumbers(
        iteration=plan.iteration,
        prompt=part.prompts.texts[prompt],
        prompt_number=part.first_prompt + prompt,
        updates=plan.updates,
        rewards=rewards,
        steps=[
            ForestStep(
                sigma=step.sigma, sigma_next=step.sigma_next, solver=step.solver, stochastic=step.stochastic,
                window=step.index in plan.window, trained=step.trained, fanout=step.fanout, nodes_in=step.nodes_in,
                nodes_out=step.nodes_out,
            )
            for step in plan.steps
        ],
        edges={step.index: _edges(recipe, part, prompt, step, whole) for step in plan.steps if step.stochastic},
        scores=scores.tolist(),
        totals=(scores.numpy() @ np.array([weight for _, weight in rewards])).tolist(),
    )  # fmt: skip


def _edges(recipe: Recipe, part: Rolled, prompt: int, step: Step, whole: Whole) -> ForestEdges:
    plan, forest, nodes = part.forest.plan, part.forest, range(step.nodes_out)
    update = [plan.update_of_edge(step, child) for child in nodes]
    untrained = _why_untrained(plan, part, prompt, step)
    omega = step_weights(plan, recipe.update.step_weight).get(step.index, 0.0)
    return ForestEdges(
        parent=[child // step.fanout for child in nodes],
        advantage=part.credit[step.index].advantage[prompt].tolist() if step.trained else [None] * step.nodes_out,
        logp=_finite(to_host(_of_prompt(forest, forest.logp, step.index + 1, prompt)).tolist())
        if step.index + 1 in forest.first_row
        else [None] * step.nodes_out,
        weight=[
            0.0 if why else omega / whole.sizes[number].selected for why, number in zip(untrained, update, strict=True)
        ],
        update=update,
        untrained=untrained,
    )


def _why_untrained(plan: RolloutPlan, part: Rolled, prompt: int, step: Step) -> list[Untrained | None]:
    if not step.trained:
        return ["depth"] * step.nodes_out
    trains = part.credit[step.index].trains[prompt].tolist()
    selected = plan.kept_edges(step, part.first_prompt + prompt)
    by_reward: Untrained = "extreme" if plan.prune is not None and plan.prune.kind == "extreme" else "parent_top1"
    return [
        None if trained else by_reward if kept else "step_fraction"
        for trained, kept in zip(trains, selected, strict=True)
    ]


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _pictures(
    recipe: Recipe, runner: PassRunner, part: Rolled, prompt: int
) -> Iterator[tuple[tuple[int, int], NDArray[np.uint8]]]:
    """Leaves, evenly spread where they are many; and clean estimates where trajectories part and at the first step that
    trains, level after level as long as they are few. All of them together are no more than is scored at once.
    """
    plan = part.forest.plan
    leaves = part.forest.leaves[prompt * plan.leaves : (prompt + 1) * plan.leaves]
    most, most_inner = most_decoded(part.policy.adapter.geometry)
    chosen = np.unique(np.linspace(0, plan.leaves - 1, min(most, plan.leaves)).round().astype(int)).tolist()
    nodes = [(len(plan.steps), leaf) for leaf in chosen]
    latents, inner = [leaves[chosen]], 0
    for step in plan.trained_steps:
        if (step.fanout > 1 or step is plan.trained_steps[0]) and inner + step.nodes_in <= most_inner:
            inner += step.nodes_in
            nodes += [(step.index, node) for node in range(step.nodes_in)]
            latents.append(clean_estimates(part, recipe.run.seed, step, prompt))
    decoded = to_bytes(shrink(runner.decode(part.policy, torch.cat(latents)), _LONGEST_SIDE).nan_to_num())
    yield from zip(nodes, decoded.numpy(), strict=True)
