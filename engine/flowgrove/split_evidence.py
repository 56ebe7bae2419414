"""What the splits of probed trees explain of the rewards, and which splits a run chooses by it (`rollout.tree.splits:
auto`). On the host, in float64.

A tree splits n times into K children. Of the nodes below the k-th split, V_k is the mean over its parents of the
variance (over K − 1) of their children's mean rewards. The children's own means scatter because of what is split below:

    E V_k = τ_k² + E V_{k+1}/K      so that      τ̂_k² = V_k − V_{k+1}/K,   τ̂_n² = V_n

is an unbiased estimate of the variance between siblings that the split's own noise causes; it may be negative. Noise
that siblings share (rollout.tree.sibling_correlation) counts for the split above. Rewards are not divided by a
prompt's spread: that of a tree hangs on its splits, and steps of different trees could not be compared.

Where there are several rewards, τ̂² is a matrix of covariances; of the weighted sum with the weights u it is uᵀτ̂²u.
Source: nested analysis of variance, as in Searle, Casella and McCulloch, Variance Components (1992).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowgrove.errors import UserError
from flowgrove.plan.planner import RolloutPlan
from flowgrove.plan.split_search import Splits, SplitSearch
from flowgrove.recipe.schema import Credit

Array = NDArray[np.float64]
_UNITS = 10**12  # shares that differ by less are the same


def variance_components(scores: Array, fanouts: list[int]) -> Array:
    """τ̂² of every split, the first one first: [splits, prompts, rewards, rewards], from the scores of the leaves,
    [prompts, leaves, rewards]. `fanouts`: those of the splits; the leaves below a node are neighbours.
    """
    prompts, leaves, rewards = scores.shape
    found: list[Array] = []
    parents = leaves
    for fanout in reversed(fanouts):
        parents //= fanout
        means = scores.reshape(prompts, parents, fanout, -1, rewards).mean(3)
        differences = means - means.mean(2, keepdims=True)
        between = np.einsum("pnkr,pnks->prs", differences, differences) / (parents * (fanout - 1))
        found.append(between)
    # from the last split on: what is below explains a K-th of its own variance, with the fanout of the level below
    components = [
        found[0],
        *(one - below / fanout for below, one, fanout in zip(found, found[1:], fanouts[:0:-1], strict=False)),
    ]
    return np.stack(components[::-1])


class SplitEvidence:
    """What the probed iterations of a run have shown of every step, and the splits that follow from it.

    It belongs to the run's state: `state` is part of a checkpoint, and every rank has the same.
    """

    def __init__(self, search: SplitSearch, credit: Credit, weights: list[float]) -> None:
        self.search, self._credit, self._weights = search, credit, np.array(weights)
        self.probed = 0
        """How many iterations have been added."""
        self.chosen: Splits | None = None
        rewards = len(weights)
        self._sums = {step: np.zeros((rewards, rewards)) for step in search.candidates}
        self._parents = dict.fromkeys(search.candidates, 0)
        self._leaves = np.zeros((rewards, rewards))  # of all splits of a tree together, summed over prompts
        self._prompts = 0

    def splits(self, iteration: int) -> Splits:
        """Those of an iteration."""
        return self.search.splits(iteration, self.chosen)

    def add(self, plan: RolloutPlan, scores: Array) -> None:
        """Takes the leaves' scores of a probed iteration, [prompts, leaves, rewards]; prompts with one that is not
        finite do not enter. After the last one the splits are chosen.
        """
        scores = scores[np.isfinite(scores).all(axis=(1, 2))]
        splits = [step for step in plan.steps if step.fanout > 1]
        components = variance_components(scores, [step.fanout for step in splits])
        self._leaves += components.sum((0, 1))
        for step, of_prompts in zip(splits, components, strict=True):
            self._sums[step.index] += step.nodes_in * of_prompts.sum(0)
            self._parents[step.index] += step.nodes_in * len(scores)
        self._prompts += len(scores)
        self.probed += 1
        if self.probed == self.search.probe:
            self.chosen = self._best()

    def shares(self) -> dict[int, float]:
        """What every step that was a split explains when it splits, as a share of the variance of a leaf that all
        splits of a tree together explain, in the mean of the probed iterations. Empty where rewards have no spread.
        """
        spread = np.sqrt(np.diag(self._leaves))
        units = self._weights
        if self._credit.normalise == "per_reward" and self._credit.std != "none":
            units = np.divide(units, spread, out=np.zeros_like(spread), where=spread > 0)
        whole = float(units @ self._leaves @ units) / max(1, self._prompts)
        if not whole > 0:
            return {}
        return {
            step: float(units @ self._sums[step] @ units) / parents / whole
            for step, parents in self._parents.items()
            if parents
        }

    def _best(self) -> Splits:
        """The splits that explain most within the budget; a share below 0 counts as 0. Without any evidence the tree
        that stands in for the chosen one.
        """
        weights = {step: max(0, round(share * _UNITS)) for step, share in self.shares().items()}
        return self.search.best(weights) if any(weights.values()) else self.search.dear

    def told(self) -> dict[str, Any]:
        """What the metrics line of the last added iteration tells of it."""
        told: dict[str, Any] = {"split_evidence": {str(step): share for step, share in self.shares().items()}}
        return told if self.chosen is None else {**told, "chosen_splits": list(self.chosen)}

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "search": self._identity(),
            "probed": self.probed,
            "chosen": None if self.chosen is None else list(self.chosen),
            "sums": {str(step): sums.tolist() for step, sums in self._sums.items()},
            "parents": {str(step): count for step, count in self._parents.items()},
            "leaves": self._leaves.tolist(),
            "prompts": self._prompts,
        }

    def restore(self, state: Any, completed: int) -> None:
        """Takes back what `state` has given after so many iterations. Raises UserError where it is that of another
        search, or of none.
        """
        due = min(completed, self.search.probe)
        if due == 0:
            return
        told = state if isinstance(state, dict) else {}
        if told.get("search") != self._identity() or told.get("probed") != due:
            raise UserError(
                f"rollout.tree.splits is auto, and the checkpoint of {completed} iterations was not written with it, "
                "or with another tree: write the splits, or begin a new run with another --out"
            )
        self.probed, self._prompts = due, told["prompts"]
        self.chosen = None if told["chosen"] is None else tuple(told["chosen"])
        self._leaves = np.array(told["leaves"])
        self._sums = {step: np.array(told["sums"][str(step)]) for step in self.search.candidates}
        self._parents = {step: told["parents"][str(step)] for step in self.search.candidates}

    def _identity(self) -> dict[str, Any]:
        search = self.search
        return {
            "steps": search.steps, "fanout": search.fanout, "count": search.count, "roots": search.roots,
            "forwards": search.budget, "compress": search.compress, "probe": search.probe, "seed": search.seed,
            "rewards": len(self._weights),
        }  # fmt: skip
