"""How many floating-point operations the ranges of an iteration stand for, as the model needs them: what gradient
checkpointing computes again is not counted.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flowgrove.plan.flops import Flops
from flowgrove.plan.planner import RolloutPlan
from flowgrove.profiler.clock import Spent
from flowgrove.spans import DECODE, TRANSFORMER

_STEP = re.compile(r"iteration (\d+)/rollout/step (\d+)/")


class Cost(NamedTuple):
    """FLOPs of a token, of the forward, of that with extrapolated attention, of the reference model's and of the
    backward, as a mean over all rows of a pass; and of a picture that is decoded.
    """

    forward: float
    extrapolated: float
    reference: float
    backward: float
    decode: float

    @classmethod
    def of(cls, flops: list[Flops], prompts: int) -> "Cost":
        """The mean of an iteration of so many prompts, which take the sizes in turn."""
        counts = [len(range(size, prompts, len(flops))) for size in range(len(flops))]
        tokens = sum(count * each.geometry.tokens for count, each in zip(counts, flops, strict=True))

        def mean(name: str, per: int) -> float:
            return sum(count * getattr(each, name) for count, each in zip(counts, flops, strict=True)) / per

        return cls(
            mean("forward", tokens), mean("extrapolated", tokens), mean("reference", tokens),
            mean("backward", tokens) * flops[0].trained / flops[0].doubled, mean("decode", prompts),
        )  # fmt: skip


def flops_of(spent: Iterable[Spent], cost: Cost, plan: Callable[[int], RolloutPlan]) -> dict[tuple[str, bool], float]:
    """FLOPs by path and thread, of the ranges that have any. `plan`: that of an iteration."""
    found = {(one.path, one.beside): _flops(one, cost, plan) for one in spent}
    return {key: flops for key, flops in found.items() if flops}


def _flops(one: Spent, cost: Cost, plan: Callable[[int], RolloutPlan]) -> float:
    if one.kind == DECODE:
        return one.rows * cost.decode
    if one.kind != TRANSFORMER:
        return 0.0
    name, step = one.path.rpartition("/")[2], _STEP.search(one.path)
    if name == "backward":
        return one.tokens * cost.backward
    if name == "reference":
        return one.tokens * cost.reference
    if step is not None:
        own, number = plan(int(step[1])), int(step[2])
        if own.extrapolates(own.steps[number]):
            return one.tokens * cost.extrapolated
    return one.tokens * cost.forward
