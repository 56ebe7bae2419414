"""How much memory a run needs, before it runs: the model's own code on tensors without storage, with every allocation
counted by a dispatch mode, which adds up what is alive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from flowgrove.models.experts import parts_of, trained_parts
from flowgrove.models.quantised import Precision, copy_bytes, quantisable, unloaded_copy
from flowgrove.models.runner import cached_layers, tokens_per_pass
from flowgrove.passes.packing import pack
from flowgrove.plan.allocations import graph_bytes, host_bytes, peak_bytes
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.planner import RolloutPlan
from flowgrove.plan.reference_velocities import keeps_reference_velocities
from flowgrove.plan.unloaded import UnloadedModel
from flowgrove.plan.weight_sizes import WeightSizes
from flowgrove.recipe.schema import Recipe
from flowgrove.rewards.registry import is_groupwise, scored_beside
from flowgrove.rewards.scoring import rolled_together, samples_at_once

_OPTIMIZER_BYTES = {"adamw": 8, "apex_fused_adam": 8, "adamw_8bit": 2}  # per trained weight

GPU_SHARE = 0.9  # of a GPU's memory can be planned with: the allocator's fragments and what libraries take
LOADED = (
    "transformer",
    "master weights",
    "VAE",
    "untouched copy",
    "rounded copy",
)  # what a policy holds before it trains


@dataclass(frozen=True)
class Memory:
    """Bytes. `resident`: what stays all the time; `stages`: what each stage needs beside it; `graph`: what a state of
    the rollout holds until the first update if its graph is retained; `rows`: rows of the largest training pass;
    `host`: pinned host memory that a training pass takes (model.gradient_checkpointing: offload).
    """

    resident: dict[str, int]
    stages: dict[str, int]
    graph: int
    rows: int
    host: int = 0

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.stages.values())

    @property
    def loaded(self) -> int:
        """What lies on the device when the model is loaded."""
        return sum(self.resident[name] for name in LOADED)


class MemoryModel(UnloadedModel):
    """A recipe's model on tensors without storage, for one kind of device; of several ranks, that with the most
    prompts. It is made once; a stage is run once for every size of its largest pass. Text encoders are taken to be
    freed.

    Divided weights lie as rows on every rank. Besides, all of them are gathered in the compute dtype while a rank rolls
    out or evaluates, and in updates too, unless those reshard: then what lies outside blocks is, and two blocks. A
    gradient of divided weights is whole in the compute dtype, then in that of the masters, until it has been divided:
    two blocks' worth at once.

    Raises UserError without configuration files, and where the model does not run as they describe it.
    """

    def __init__(self, recipe: Recipe, plan: RolloutPlan, device_type: str, division: Division = ALONE) -> None:
        super().__init__(recipe)
        self.plan, self.device_type, self.division = plan, device_type, division
        self.prompts = max(division.prompts(recipe))
        self.like_cuda = device_type == "cuda" and self.compute == torch.bfloat16
        self.sizes = WeightSizes.of(self.transformer, division.shards, recipe.model.lora is not None)
        with self.running():
            cond = self.adapter.blank(self.prompts, self.compute)
        self.embeddings = sum(tensor.untyped_storage().nbytes() for tensor in cond.tensors.values())
        self._peaks: dict[tuple[str, int], int] = {}

    def at(self, tokens: int, reshard: bool = False) -> Memory:
        """The memory of an iteration whose passes hold `tokens`. `reshard`: updates gather divided weights block by
        block.
        """
        rolled, trained = self._largest_passes(tokens)
        training = self.sizes.at_once * self.compute.itemsize if reshard else self.gathered
        cached = self._cached(tokens)
        counted = {
            "training": self._once("training", trained, self._training) + training + self._gradients_on_their_way(),
            "rollout": self._rollout(rolled) + cached + self.gathered,
            "decoding": self._once("decoding", self._pictures(), self._decoding) + self.gathered,
        }
        if self.device_type == "cuda":  # there pictures are decoded and scored beside the next rollout
            counted["rollout with decoding"] = counted.pop("rollout") + counted.pop("decoding") - self.gathered
        if self.division.ranks > 1:  # a flat copy of those that every rank has whole
            flat = self.sizes.trained_whole * self.master.itemsize
            counted["adding gradients up"] = flat + (0 if reshard else self.gathered)
        if self.copies and self.recipe.run.eval.tuned_share < 1 and self.gathered:
            rollout = max(counted[name] for name in counted if name.startswith("rollout"))
            counted["evaluation"] = rollout - cached + self.gathered
        host = self._once("host", trained, self._offloaded)
        return Memory(self.resident(tokens, reshard), counted, self.graph, trained * self.doubled, host)

    def fitting(self, total: int, foreign: int = 0) -> "Fit | None":
        """The largest passes whose predicted peak fits into nine tenths of `total` bytes, beside `foreign` ones, and
        whether updates then reshard, which they do only where they must. Rows of a pass are a power of two up to what
        engine.token_budget allows, and its tokens where it is a number; engine.reshard_after_forward is heeded where it
        is not auto. None: not even a pass of one row fits.
        """
        budget, row = tokens_per_pass(self.recipe, self.device_type), self.geometry.tokens * self.doubled
        powers = [row << power for power in range(max(1, budget // row).bit_length())]
        for tokens in reversed(powers) if self.recipe.engine.token_budget == "auto" else (budget,):
            for reshard in self.ways:
                if self.at(tokens, reshard).peak + foreign <= GPU_SHARE * total:
                    return Fit(tokens, reshard)
        return None

    @property
    def graph(self) -> int:
        """Bytes that a state of the rollout holds until the first update if its graph is retained."""
        return self._once("graph", 1, self._graph)

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether updates may gather divided weights block by block: what engine.reshard_after_forward leaves open."""
        wanted = self.recipe.engine.reshard_after_forward
        return (False,) if not self.gathered else (False, True) if wanted == "auto" else (wanted,)

    def passes_of_update(self, tokens: int) -> int:
        """How many passes of `tokens` an update takes."""
        states = self._trained_states()
        return len(pack(np.full(states, self.geometry.tokens * self.doubled), tokens))

    @property
    def gathered(self) -> int:
        """Bytes of all divided weights in the compute dtype."""
        return self.sizes.gathered * self.compute.itemsize

    @property
    def copies(self) -> bool:
        """Whether a copy of the untouched model is held; with LoRA it is the model without its layers."""
        return self.recipe.model.lora is None and self.recipe.uses_reference

    def _untouched(self) -> int:
        """Bytes of what the reference model does not share."""
        if self.recipe.model.trains_initial_lora and self.recipe.uses_reference:
            return self.sizes.trained * self.compute.itemsize
        if not self.copies:
            return 0
        sizes, copied = self.sizes, "" if self.sizes.divided else tuple(trained_parts(self.transformer))
        named = self.transformer.named_parameters()
        own = sum(weight.numel() for name, weight in named if name not in sizes.divided and name.startswith(copied))
        return (sizes.trained_rows + sizes.frozen_rows + own) * self.compute.itemsize

    def _gradients_on_their_way(self) -> int:
        """Bytes of gradients of divided weights before they are divided themselves."""
        both = self.compute.itemsize + self.master.itemsize
        return 2 * self.sizes.largest_block * both if self.sizes.trained_rows else 0

    def _weights(self) -> tuple[int, int]:
        """Bytes of the transformer as it lies on a rank, and of masters beside it."""
        sizes, rows = self.sizes, self.sizes.trained_rows * self.master.itemsize
        whole = [weight for name, weight in self.transformer.named_parameters() if name not in sizes.divided]
        bytes_of_whole = sum(tensor.nbytes for tensor in (*whole, *self.transformer.buffers()))
        masters = sum(master.nbytes for name, master in self.masters.items() if name not in sizes.divided)
        transformer = bytes_of_whole + sizes.frozen_rows * self.compute.itemsize
        return (transformer, masters + rows) if self.compute == torch.bfloat16 else (transformer + rows, masters)

    def resident(self, tokens: int, reshard: bool = False) -> dict[str, int]:
        """Bytes of what stays all the time, by name; runs a pass only where one is recorded."""
        recipe, plan, sizes = self.recipe, self.plan, self.sizes
        transformer, masters = self._weights()
        stays_gathered = self.copies and recipe.update.kl_weight > 0 and not reshard
        levels = sorted({end for step in plan.trained_steps for end in (step.index, step.index + 1)})
        nodes = [plan.steps[level].nodes_in if level < len(plan.steps) else plan.leaves for level in levels]
        resident = {
            "transformer": transformer,
            "master weights": masters,
            "VAE": self.vae_bytes,
            "untouched copy": self._untouched(),
            "untouched copy, gathered": self.gathered if stays_gathered else 0,
            "rounded copy": 0 if plan.precision is None else copy_bytes(self.transformer, plan.precision),
            "gradients": sizes.trained * self.master.itemsize,
            "optimiser": sizes.trained * _OPTIMIZER_BYTES[recipe.update.optimizer],
            "averaged weights": sizes.trained * self.master.itemsize if recipe.update.ema_decay else 0,
            "forest": self.prompts * sum(nodes) * self._state_bytes,
            "prompts": self.embeddings,
        }
        if keeps_reference_velocities(recipe, plan, self.division.shards is not None):
            resident["reference velocities"] = self.prompts * sum(nodes[:-1]) * self._state_bytes
        if recipe.engine.cuda_graphs:  # recordings hold their memory for good
            resident["CUDA graphs"] = self._rollout(self._largest_passes(tokens)[0])
        return resident

    @property
    def _state_bytes(self) -> int:
        return torch.Size(self.geometry.latent_shape).numel() * self.master.itemsize

    def _pictures(self) -> int:
        """Pictures that are decoded together."""
        leaves = self.prompts * self.plan.leaves
        return min(self.adapter.samples_per_decode(self.device_type), leaves)

    def _largest_passes(self, budget: int) -> tuple[int, int]:
        """States of the largest pass in the rollout and in training."""
        tokens = self.geometry.tokens * self.doubled

        def largest(states: int) -> int:
            return max((len(rows) for rows in pack(np.full(states, tokens), budget)), default=1)

        share, plan = self.recipe.engine.share, self.plan
        levels = [step.nodes_in if share else plan.leaves for step in plan.steps]
        return max(largest(self.prompts * nodes) for nodes in levels), largest(self._trained_states())

    def _trained_states(self) -> int:
        """States that the largest update trains."""
        return self.prompts * max(
            states if self.recipe.engine.share else edges for edges, states in self.plan.trained_by_update
        )

    def _once(self, stage: str, size: int, count: Callable[[int], int]) -> int:
        if (stage, size) not in self._peaks:
            with self.running():
                self._peaks[stage, size] = count(size)
        return self._peaks[stage, size]

    def _rollout(self, states: int) -> int:
        """Bytes of a pass of the rollout, and of x, v, x' and a history of the widest level."""
        width = max(step.nodes_out for step in self.plan.steps)
        widest = 4 * self.prompts * width * self._state_bytes
        largest = self._once("rollout", states, self._rolling)
        if self.plan.precision is not None:
            largest = max(largest, self._once("cheap rollout", states, self._rolling_cheaply))
        return largest + widest

    def _cached(self, tokens: int) -> int:
        """Bytes that rollout.cache holds of the prompts that are rolled out together, in passes of `tokens`: of every
        leaf what the extrapolated layers of each expert gave, and its differences.
        """
        cache, recipe, plan = self.recipe.rollout.cache, self.recipe, self.plan
        if cache is None:
            return 0
        together = self.prompts
        if scored_beside(recipe, self.device_type) and not recipe.engine.exact_replay:
            narrowest = self.geometry.tokens * self.doubled * (plan.roots if recipe.engine.share else plan.leaves)
            together = min(together, rolled_together(tokens, narrowest))
        given = self._once("cache", 1, lambda states: sum(self._outputs_of_attention(states)))
        experts = len({step.expert for step in plan.steps if plan.caches(step)})
        return together * plan.leaves * experts * (cache.order + 1) * given * self.compute.itemsize

    @torch.no_grad()
    def _outputs_of_attention(self, states: int) -> list[int]:
        """Elements of each."""
        found: list[int] = []

        def count(module: nn.Module, inputs: object, outputs: Tensor | tuple[Tensor, ...]) -> None:
            found.extend(one.numel() for one in ((outputs,) if isinstance(outputs, Tensor) else outputs))

        layers = [layer for part in parts_of(self.transformer) for layer in cached_layers(part)]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            self.velocity(states)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _rolling(self, states: int) -> int:
        @torch.no_grad()
        def roll() -> Tensor:
            return self.velocity(states)

        return peak_bytes(roll, self.like_cuda)

    def _rolling_cheaply(self, states: int) -> int:
        """Bytes of a pass in rollout.precision. On a GPU the rounding of activations is one kernel, so that a layer
        holds its rounded input and, of int8, its sums beside what a layer of full precision holds.
        """
        precision = cast(Precision, self.plan.precision)
        if self.like_cuda:
            layers = quantisable(self.transformer, precision).values()
            sums = torch.int32.itemsize if precision == "int8" else 0
            widest = max((layer.in_features + sums * layer.out_features for layer in layers), default=0)
            return self._rolling(states) + states * self.doubled * self.geometry.tokens * widest
        cheap = self.on(unloaded_copy(self.transformer, precision, self.compute))

        @torch.no_grad()
        def roll() -> Tensor:
            return cheap.velocity(states)

        return peak_bytes(roll)

    def _training(self, states: int) -> int:
        """Gradients stay and are counted as resident: they are there before the pass, as of another one."""
        trained = [
            self.masters.get(name, weight)
            for name, weight in self.transformer.named_parameters()
            if weight.requires_grad
        ]
        for weight in trained:
            weight.grad = torch.empty_like(weight)

        def train() -> None:
            v = self.velocity(states)
            v.backward(torch.empty_like(v))

        try:
            return peak_bytes(train, self.like_cuda)
        finally:
            for weight in trained:
                weight.grad = None

    def _offloaded(self, states: int) -> int:
        if self.recipe.model.gradient_checkpointing != "offload":
            return 0
        return host_bytes(lambda: self.velocity(states))

    def _decoding(self, pictures: int) -> int:
        """Bytes of decoding, of what is scored together, and of what scoring it takes beside it."""
        decoded = peak_bytes(
            lambda: self.adapter.decode(torch.empty(pictures, *self.geometry.latent_shape, dtype=self.master))
        )
        leaves, pixels = self.prompts * self.plan.leaves, self.geometry.pixels
        whole = self.plan.leaves if any(map(is_groupwise, self.recipe.reward)) else 1  # such a group is never cut
        scored = min(leaves, samples_at_once(pixels, whole)) * pixels * 3
        return decoded + 2 * scored * torch.float32.itemsize

    def _graph(self, _: int) -> int:
        return graph_bytes(self.velocity, self.like_cuda)


class Fit(NamedTuple):
    """Tokens of a pass, and whether updates gather divided weights block by block."""

    tokens: int
    reshard: bool


def predict_memory(recipe: Recipe, plan: RolloutPlan, device_type: str) -> Memory:
    """Peak memory of an iteration on one device, with the recipe's token budget. Raises UserError."""
    return MemoryModel(recipe, plan, device_type).at(tokens_per_pass(recipe, device_type))
