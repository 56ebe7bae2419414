"""Credit: leaf scores become an advantage for every edge. On the host, in float64.

    r̄(n) = Σ_{leaves below n} softmax(β·path logp)·R            (β = 0: the plain mean)
    A(n) = (r̄(n) − baseline)/(std + 1e-8); an edge carries its child's advantage

As published, baseline and std are the mean and the standard deviation of the nodes of one prompt and depth: a flat
group, which is the forest with one split, gets the group-normalised reward of GRPO. Sources: GRPO (2402.03300),
BranchGRPO (2509.06040).

An expected policy gradient takes no divisor (`std: none`) and a baseline that knows nothing of the edge's own noise z.
Of the n nodes of a depth only the K siblings share noise with z: with correlation ρ, E[z | z'] = ρ·z', so that
E[z·r̄(sibling)] = ρ·E[z·r̄(n)], and the expectation is the gradient times

    1 − (1 + (K − 1)·ρ)/n     baseline: depth, which holds the edge itself
    1 − ρ                     baseline: siblings, the mean of the other K − 1

and ρ counts only at the split itself: the noise of the edges that follow is their own.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.recipe.schema import Credit

Array = NDArray[np.float64]
_ALIKE = 1e-6  # a group whose values span no more than this carries no signal


@dataclass(frozen=True)
class EdgeCredit:
    """For the edges of one trained step, [prompts, nodes_out]:
    the advantage, and whether plan, step_fraction and pruning train the edge.
    """

    advantage: Array
    trains: NDArray[np.bool_]


def assign_credit(
    plan: RolloutPlan,
    credit: Credit,
    scores: Array,
    weights: list[float],
    path_logp: Array | None = None,
    first_prompt: int = 0,
) -> dict[int, EdgeCredit]:
    """Step index → credit of its edges. scores: float64 [prompts, leaves, rewards]; path_logp [prompts, leaves]:
    only for fusion_beta ≠ 0. A prompt with a score that is not finite enters nothing, and no edge of it trains.
    """
    scored: NDArray[np.bool_] = np.asarray(np.isfinite(scores).all(axis=(1, 2)))
    numbers = [first_prompt + number for number, whole in enumerate(scored.tolist()) if whole]
    scores, path_logp = scores[scored], None if path_logp is None else path_logp[scored]
    prompts = len(scores)
    terms = (
        [(1.0, scores @ np.array(weights))]
        if credit.normalise == "weighted_sum"
        else [(w, scores[..., k]) for k, w in enumerate(weights)]
    )
    kept = _kept_leaves(plan, scores @ np.array(weights), path_logp, credit)
    result = {}
    for step in plan.trained_steps:
        advantage = np.zeros((prompts, step.nodes_out))
        for weight, reward in terms:
            values = fused(reward, step.nodes_out, path_logp, credit.fusion_beta)
            advantage += weight * advantages(values, reward, credit, compared_nodes(plan, step, credit.baseline))
        selected = np.array([plan.kept_edges(step, number) for number in numbers])
        below = kept.reshape(prompts, step.nodes_out, -1).any(-1)
        shape = (len(scored), step.nodes_out)
        of_all = EdgeCredit(np.zeros(shape), np.zeros(shape, dtype=np.bool_))
        of_all.advantage[scored] = np.clip(advantage, -credit.adv_clip, credit.adv_clip)
        of_all.trains[scored] = selected & below
        result[step.index] = of_all
    return result


def part_of(credit: dict[int, EdgeCredit], prompts: slice) -> dict[int, EdgeCredit]:
    """The credit of some prompts."""
    return {index: EdgeCredit(edges.advantage[prompts], edges.trains[prompts]) for index, edges in credit.items()}


def advantage_by_step(credit: dict[int, EdgeCredit]) -> dict[str, float]:
    """Mean |advantage| of the edges that train, for every trained step (its index as JSON keys are) that has some."""
    return {
        str(index): float(np.abs(edges.advantage[edges.trains]).mean())
        for index, edges in credit.items()
        if edges.trains.any()
    }


def fused(reward: Array, nodes: int, path_logp: Array | None, beta: float) -> Array:
    """r̄ of every node of a level: leaf rewards [prompts, leaves] → [prompts, nodes]."""
    below = reward.reshape(len(reward), nodes, -1)
    if beta == 0.0 or path_logp is None:
        return below.mean(-1)
    logits = beta * path_logp.reshape(below.shape)
    share = np.exp(logits - logits.max(-1, keepdims=True))
    return (share / share.sum(-1, keepdims=True) * below).sum(-1)


def compared_nodes(plan: RolloutPlan, step: Step, baseline: str) -> int:
    """How many neighbouring children of a step are compared with each other: all of the prompt's ("depth"), or the
    children of one parent ("siblings"). Where the step does not split, the nodes of its level stand for those that the
    last split before it made, whose leaves are theirs; before the first split all roots are compared.
    """
    if baseline == "depth":
        return step.nodes_out
    fanouts = [before.fanout for before in plan.steps[: step.index + 1] if before.fanout > 1]
    return fanouts[-1] if fanouts else plan.roots


def advantages(values: Array, leaves: Array, credit: Credit, compared: int) -> Array:
    """(values − baseline)/(std + 1e-8) of one reward, [prompts, nodes]. `leaves`: the same reward of the leaves,
    [prompts, leaves]; every `compared` neighbouring nodes have their baseline in common, 0 where they are alike.
    """
    prompts, nodes = values.shape
    if compared < 2:
        return np.zeros_like(values)
    groups = values.reshape(prompts, nodes // compared, compared)
    differences = groups - groups.mean(axis=-1, keepdims=True)
    if credit.baseline == "siblings":
        differences *= compared / (compared - 1)  # from the mean of the others
    alike = np.ptp(groups, axis=-1, keepdims=True) <= _ALIKE
    return np.where(alike, 0.0, differences).reshape(values.shape) / _divisor(values, leaves, credit)


def _divisor(values: Array, leaves: Array, credit: Credit) -> Array | float:
    """What differences are divided by: [prompts, 1], or one number for all prompts."""
    if credit.std == "none":
        return 1.0
    if credit.std == "global":
        return float(values.std(ddof=1)) + 1e-8
    spread = (leaves if credit.std == "leaves" else values).std(axis=1, ddof=1, keepdims=True)
    if credit.std_shrinkage > 0:
        freedom, prior = values.shape[1] - 1, credit.std_shrinkage
        of_leaves = leaves.std(axis=1, ddof=1, keepdims=True)
        spread = np.sqrt((freedom * spread**2 + prior * of_leaves**2) / (freedom + prior))
    return spread + 1e-8


def _kept_leaves(plan: RolloutPlan, total: Array, path_logp: Array | None, credit: Credit) -> NDArray[np.bool_]:
    """Which leaves pruning by reward keeps, [prompts, leaves]; a prompt is only ever compared with itself."""
    prompts, leaves = total.shape
    if credit.prune is None or credit.prune.kind == "depth":
        return np.ones((prompts, leaves), dtype=bool)
    if credit.prune.kind == "extreme":
        order = np.argsort(total, axis=1, kind="stable")
        rank = np.argsort(order, axis=1, kind="stable")
        return (rank < credit.prune.keep) | (rank >= leaves - credit.prune.keep)
    last = plan.last_split()
    children = fused(total, last.nodes_out, path_logp, credit.fusion_beta).reshape(prompts, -1, last.fanout)
    best = children.argmax(-1)[..., None] == np.arange(last.fanout)  # [prompts, parents, fanout]
    return np.repeat(best.reshape(prompts, -1), leaves // last.nodes_out, axis=1)
