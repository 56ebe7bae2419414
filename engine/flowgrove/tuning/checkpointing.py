"""model.gradient_checkpointing: auto. What training passes compute again is weighed together with the rollout's graphs
that the rest of the memory keeps, each of which saves a forward.
"""

import logging
from typing import NamedTuple

import torch

from flowgrove.device import allocated_memory, pick_device, total_memory
from flowgrove.models.runner import tokens_per_pass
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.flops import count_flops
from flowgrove.plan.memory import GPU_SHARE
from flowgrove.ranks import Ranks
from flowgrove.recipe.checks import checkpointing_with
from flowgrove.recipe.schema import Checkpointing
from flowgrove.setup import Setup
from flowgrove.tuning.graph_room import GraphRoom, room_of_cpu

# of a forward's time, what selective checkpoints run again and FLOPs do not show: norms, activations, modulation; an
# estimate, as it has not been measured
_ELEMENT_BY_ELEMENT = 0.1
_log = logging.getLogger("flowgrove")


class Need(NamedTuple):
    """What a value of model.gradient_checkpointing takes. Bytes: the predicted `peak` without graphs of the rollout,
    and one `graph`. FLOPs of a state: its `forward`, and what is computed `again`. `states`: that train in an
    iteration, `first`: in its first update.
    """

    kind: Checkpointing
    peak: int
    graph: int
    forward: float
    again: float
    states: int
    first: int


class Way(NamedTuple):
    """The same on a device: whether the peak `fits`, the states whose graphs are `kept` beside it, and the `flops` that
    the updates of an iteration then take more than a forward and a backward of every state.
    """

    need: Need
    fits: bool
    kept: int
    flops: float


def needs(setup: Setup, device_type: str, division: Division = ALONE) -> list[Need]:
    """Of every value that the recipe may have. Raises UserError as a prediction of memory does."""
    return [
        _need(setup.computing_again(kind), kind, device_type, division)
        for kind in checkpointing_with(setup.recipe.engine)
    ]


def _need(setup: Setup, kind: Checkpointing, device_type: str, division: Division) -> Need:
    recipe, model = setup.recipe, setup.memory(device_type, division)
    tokens = tokens_per_pass(recipe, device_type)
    flops = max(count_flops(recipe, model), key=lambda one: one.geometry.tokens)
    again = flops.recomputed + (_ELEMENT_BY_ELEMENT * flops.forward if kind == "selective" else 0)
    trained = setup.first_plan.trained_by_update
    states = [model.prompts * (states if recipe.engine.share else edges) for edges, states in trained]
    peak = min(model.at(tokens, reshard).peak for reshard in model.ways)
    forward, again = flops.doubled * flops.forward, flops.trained * again
    return Need(kind, peak, model.graph, forward, again, sum(states), states[0])


def ways(
    setup: Setup, found: list[Need], on_gpu: bool, total: int, foreign: int = 0, division: Division = ALONE
) -> list[Way]:
    """Of each on a device with `total` bytes beside `foreign` ones; graphs get what is left, on a CPU a share."""

    def way(need: Need) -> Way:
        left = int(GPU_SHARE * total) - need.peak - foreign
        room = max(0, left if on_gpu or left < 0 else room_of_cpu(total, division.ranks))
        fitting = GraphRoom.asked(setup.recipe, division.shards is not None, lambda: room // need.graph).states
        kept = min(fitting, need.first)
        return Way(need, left >= 0, kept, need.states * need.again - kept * need.forward)

    return [way(need) for need in found]


def best(found: list[Way]) -> Checkpointing:
    """The fastest of those that fit; if none does, that with the least peak."""
    fitting = [way for way in found if way.fits]
    chosen = min(fitting, key=lambda way: way.flops) if fitting else min(found, key=lambda way: way.need.peak)
    return chosen.need.kind


def settled(setup: Setup, device: torch.device, ranks: Ranks | None = None) -> Setup:
    """The set-up with one of the values for auto, the same on all ranks; another value stays. Asked before the model is
    loaded, beside models of rewards. Raises UserError.
    """
    if setup.recipe.model.gradient_checkpointing != "auto":
        return setup
    ranks = ranks or Ranks()
    division = Division.of(setup.recipe.engine, ranks.size)

    def choose() -> str:
        found = needs(setup, device.type, division)
        on_gpu = device.type == "cuda"
        kind = best(ways(setup, found, on_gpu, total_memory(device), allocated_memory(device), division))
        _log.info("model.gradient_checkpointing: auto is %s", kind)
        return kind

    return setup.computing_again(ranks.chosen(ranks.by_first(choose)) or "full")


def settled_here(setup: Setup, device_type: str, division: Division) -> tuple[Setup, list[Way] | None]:
    """The same for a plan, with what was weighed: full and None where this machine has no device of the type."""
    if setup.recipe.model.gradient_checkpointing != "auto":
        return setup, []
    if device_type == "cuda" and not torch.cuda.is_available():
        return setup.computing_again("full"), None
    device = pick_device(setup.recipe)
    found = ways(setup, needs(setup, device_type, division), device_type == "cuda", total_memory(device), 0, division)
    return setup.computing_again(best(found)), found
