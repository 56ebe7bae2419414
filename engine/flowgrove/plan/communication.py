"""What a rank sends to the others in an iteration: bytes, predicted from a recipe and the sizes of its model's weights.

Collectives are taken as rings. Of an all-gather or a reduce-scatter of B bytes in all, each of n ranks sends
B · (n − 1) / n; of an all-reduce of B bytes twice that. Scores, errors and signals are a few bytes and not counted.

With N ranks, S of them dividing weights (engine.distributed: ddp: none), U updates, and P training passes of an
iteration on the rank that has the most:

- gradients that every rank has whole: an all-reduce of them an update, in the masters' dtype, over N;
- divided weights: an all-gather of them in the compute dtype, over S: one for the rollout, which also serves the first
  update, and one for each later update. Where updates reshard: one for the rollout, and in every pass two (its forward;
  its backward, in which checkpoints compute again), one more for the reference model's, and one for each pass that only
  takes the old policy's log-probability anew;
- gradients of divided weights: a reduce-scatter in every pass, in the masters' dtype, over S; and with N / S copies of
  the division an all-reduce of a rank's rows an update, over these.

An evaluation gathers the divided weights once, and the reference model's with run.eval.tuned_share.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flowgrove.models.runner import tokens_per_pass
from flowgrove.plan.division import Division
from flowgrove.plan.memory import Memory, MemoryModel
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Recipe


@dataclass(frozen=True)
class Communication:
    """Bytes that a rank sends: in an iteration, by what is sent, and in an evaluation."""

    iteration: dict[str, int]
    evaluation: int

    @property
    def total(self) -> int:
        return sum(self.iteration.values())


class Prediction(NamedTuple):
    """What an iteration takes; `reshard`: updates gather divided weights block by block."""

    reshard: bool
    memory: Memory
    communication: Communication


def predict_communication(model: MemoryModel, tokens: int, reshard: bool = False) -> Communication:
    """What the ranks of `model.division` send, with passes of `tokens`. `reshard`: updates gather divided weights block
    by block.
    """
    recipe, division, sizes = model.recipe, model.division, model.sizes
    shards = division.shards or 1
    updates = model.plan.updates if model.plan.trained_steps else 0
    passes, kl = model.passes_of_update(tokens), recipe.update.kl_weight > 0
    refreshes = (
        model.compute == torch.bfloat16
        and recipe.engine.share
        and not recipe.engine.exact_replay
        and recipe.update.step_weight != "guard"
    )
    gathers = max(updates, 1)
    if reshard:
        gathers = 1 + updates * passes * (3 if kl else 2) + (max(updates - 1, 0) * passes if refreshes else 0)
    each_gather = _ring(model.gathered, shards)
    scattered = _ring(sizes.gathered_trained * model.master.itemsize, shards)
    between_copies = 2 * _ring(sizes.trained_rows * model.master.itemsize, division.ranks // shards)
    whole = 2 * _ring(sizes.trained_whole * model.master.itemsize, division.ranks)
    if not sizes.gathered:
        return Communication({"gradients added up": updates * whole}, 0)
    sent = {
        "weights gathered": gathers * each_gather,
        "gradients divided": updates * passes * scattered,
        "gradients added up": updates * (whole + between_copies),
    }
    return Communication(sent, each_gather * (2 if recipe.run.eval.tuned_share < 1 and model.copies else 1))


def predict(recipe: Recipe, plan: RolloutPlan, device_type: str, division: Division) -> list[Prediction]:
    """Memory of the rank that needs most, and what it sends, with the recipe's token budget: for each way to gather
    divided weights in updates that the recipe leaves open. Raises UserError.
    """
    model, tokens = MemoryModel(recipe, plan, device_type, division), tokens_per_pass(recipe, device_type)
    return [
        Prediction(reshard, model.at(tokens, reshard), predict_communication(model, tokens, reshard))
        for reshard in model.ways
    ]


def _ring(size: int, ranks: int) -> int:
    """Bytes that each of so many ranks sends in an all-gather or a reduce-scatter of `size` bytes in all."""
    return size * (ranks - 1) // ranks
