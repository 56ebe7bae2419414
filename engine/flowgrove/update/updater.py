"""The optimiser updates of one iteration: packed passes, one fused loss and gradient each,
one optimiser step per update.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory, to_host
from flowgrove.models.experts import Experts
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.passes.out_of_memory import PassTooLargeError, retry_smaller
from flowgrove.plan.reference_velocities import keeps_reference_velocities
from flowgrove.ranks import Ranks
from flowgrove.recipe.schema import Expert, Recipe
from flowgrove.spans import COMMUNICATION, OPS, OPTIMIZER, TRANSFORMER, span
from flowgrove.update.ema import Ema
from flowgrove.update.micro_batches import MicroBatch
from flowgrove.update.optimizers import make_optimizer
from flowgrove.update.passes import Rolled, UpdatePasses, Whole
from flowgrove_kernels import NoiseKey, grpo_loss_and_grad


@dataclass
class UpdateStats:
    """What an iteration's updates leave for the metrics:
    per pass, tensors on the device that are read once at its end.
    """

    ratio: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    log_ratio: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    drift: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    train_passes: int = 0
    skipped: list[Tensor] = field(default_factory=list)

    def add(self, more: "UpdateStats") -> None:
        """Takes in what another update left."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(more, part.name))

    def gathered(self, ranks: Ranks) -> "UpdateStats":
        """What all ranks' updates left, in host memory where there are several. The gradient's norm is that of all."""
        if ranks.size == 1:
            return self
        edges = [_column(parts) for parts in (self.ratio, self.clipped, self.log_ratio)]
        ratio, clipped, log_ratio = torch.cat(ranks.gather(torch.stack(edges, dim=1))).unbind(1)
        loss, drift = (torch.cat(ranks.gather(_column(parts))) for parts in (self.loss, self.drift))
        if not len(ratio):
            return UpdateStats()
        passes = ranks.total(self.train_passes)
        norms, skipped = list(_column(self.grad_norm)), list(_column(self.skipped))
        return UpdateStats([ratio], [clipped], [log_ratio], list(loss), [drift], norms, passes, skipped)


def _column(parts: list[Tensor]) -> Tensor:
    """Parts of any shapes after each other, float64 [n] in host memory."""
    flat = torch.cat([part.reshape(-1).double() for part in parts]) if parts else torch.empty(0, dtype=torch.float64)
    return to_host(flat)


_Pass = tuple[Rolled, MicroBatch]


class Updater:
    """Owns the optimiser of a policy's weights. One call trains on one iteration's forest, each of the `ranks` on its
    own part of it, in passes of `runner`.
    """

    def __init__(self, recipe: Recipe, policy: Policy, runner: PassRunner, ranks: Ranks | None = None) -> None:
        self.recipe, self.policy, self.runner, self.ranks = recipe, policy, runner, ranks or Ranks()
        self.weights = policy.weights
        update = recipe.update
        masters, pieces = self.weights.trainable(), self.weights.pieces
        self.parameters = list(masters.values())
        self._whole = [master for name, master in masters.items() if name not in pieces]
        self._divided = [master for name, master in masters.items() if name in pieces]
        self.optimizer = make_optimizer(update, self.parameters, policy.device)
        self.ema = None if update.ema_decay is None else Ema(self.weights, update.ema_decay)
        # tokens of the last pass of a meeting; 0: it had one row; None: none has begun
        self._in_turn: int | None = None

    def run(self, parts: list[Rolled], whole: Whole | None = None) -> UpdateStats:
        """All updates of the iteration. Where the device's memory is too small, the rollout's graphs are given up, then
        passes halved, and the update's work is repeated.

        `whole`: what all ranks' parts are together; None: these are all. A rank may have none.
        """
        whole = whole or Whole.of(self.recipe, parts)
        stats = UpdateStats()
        if not whole.plan.trained_steps:  # pruning may leave an iteration without any
            return stats
        passes = UpdatePasses(self.recipe, parts, self.runner, [size.selected for size in whole.sizes])
        self.weights.meet()
        for number, size in enumerate(whole.sizes):
            with span(f"update {number}"):
                if self.weights.sharded:
                    stats.add(self._gradient_in_meetings(passes, number))
                else:
                    stats.add(self.ranks.together(partial(self._gradient, passes, number)))
                with span("optimizer", OPTIMIZER):
                    self._step(stats, size.trains, whole.plan.iteration, number, len(whole.sizes))
        return stats

    def _gradient(self, passes: UpdatePasses, number: int) -> UpdateStats:
        """Leaves this rank's gradient of update `number`."""
        stats = retry_smaller(lambda: self._accumulate(passes, number), lambda: passes.shrink(number))
        if number == 0:  # the old policy is still in place, and the rollout's graphs are gone
            retry_smaller(passes.refresh_old_logp, lambda: passes.shrink(1))
        passes.batches[number] = []
        return stats

    def _gradient_in_meetings(self, passes: UpdatePasses, number: int) -> UpdateStats:
        """The same where ranks have divided the weights."""
        with self._meeting():
            return self._accumulate_in_meetings(passes, number)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around passes of ranks that have divided the weights: each runs as many as the one with the most. None of
        them can be repeated by one rank alone, so that a memory that is full ends the run. Raises PassTooLargeError.
        """
        self._in_turn = None
        with self.ranks.meeting():
            try:
                yield
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                budget = self.runner.budget
                before = budget.tokens
                # a rollout's passes may be larger than any that trains: half of those might be no less than this one
                smaller = budget.halve() if self._in_turn is None else budget.halve_from(self._in_turn)
                raise PassTooLargeError(self.ranks.rank, before, budget.tokens if smaller else None) from error

    def _idle(self, expert: Expert | None) -> None:
        """What `_backward` is to the other ranks."""
        self._in_turn = 0
        with span("idle_pass", TRANSFORMER):
            if self.recipe.update.kl_weight > 0:
                with self.policy.reference() as reference:
                    reference.of_expert(expert).idle_pass(backward=False)
            self.policy.of_expert(expert).idle_pass(backward=True)

    def _accumulate_in_meetings(self, passes: UpdatePasses, number: int) -> UpdateStats:
        stats = UpdateStats()
        self._passes_in_meetings(passes.batches[number], stats, on_policy=number == 0)
        if number == 0:
            for expert, own, most in self._meetings(passes.to_refresh()):
                for one in own:
                    self._take_turn(*one)
                    passes.refresh_old_logp([one])
                for _ in range(most - len(own)):
                    self._in_turn = 0
                    with span("idle_pass", TRANSFORMER):
                        self.policy.of_expert(expert).idle_pass(backward=False)
        passes.batches[number] = []
        return stats

    def _passes_in_meetings(self, batches: list[_Pass], stats: UpdateStats, on_policy: bool) -> None:
        self.weights.drop_gradients()
        for expert, own, most in self._meetings(batches):
            for turn in range(most):
                self.weights.reduce_copies(last=turn == most - 1)
                if turn < len(own):
                    self._take_turn(*own[turn])
                    self._pass(turn, *own[turn], stats, on_policy)
                else:
                    self._idle(expert)
        self.weights.take_gradients()

    def _take_turn(self, part: Rolled, batch: MicroBatch) -> None:
        """Writes down how large the pass is that comes now."""
        # as the budget counts it, padding included
        self._in_turn = len(batch) * int(part.prompts.tokens[batch.prompts].max()) if len(batch) > 1 else 0

    def _meetings(self, batches: list[_Pass]) -> list[tuple[Expert | None, list[_Pass], int]]:
        """A rank's passes by the expert that they run, which all ranks gather together, each with the most that one
        of them has.
        """
        transformer = self.policy.transformer
        experts = transformer.trained if isinstance(transformer, Experts) else (None,)
        mine = [[one for one in batches if one[1].expert == expert] for expert in experts]
        return [(expert, own, self.ranks.most(len(own))) for expert, own in zip(experts, mine, strict=True)]

    def _accumulate(self, passes: UpdatePasses, number: int) -> UpdateStats:
        """The gradient of update `number`, from nothing."""
        stats = UpdateStats()
        self._passes(passes.batches[number], stats, on_policy=number == 0)
        passes.drop_graphs()
        return stats

    def _passes(self, batches: list[tuple[Rolled, MicroBatch]], stats: UpdateStats, on_policy: bool) -> None:
        self.weights.drop_gradients()
        for turn, (part, batch) in enumerate(batches):
            self._pass(turn, part, batch, stats, on_policy)

    def _pass(self, turn: int, part: Rolled, batch: MicroBatch, stats: UpdateStats, on_policy: bool) -> None:
        """Pass number `turn` of the update, forward and backward."""
        with span(f"pass {turn}", rows=len(batch), tokens=part.tokens_of(batch)):
            self._backward(part, batch, stats, on_policy)

    def _backward(self, part: Rolled, batch: MicroBatch, stats: UpdateStats, on_policy: bool) -> None:
        update, plan, states = self.recipe.update, part.forest.plan, part.forest.states
        x, rolled_logp = states[batch.state], part.forest.logp[batch.child]
        guard = update.step_weight == "guard"
        key = None
        if guard:
            key = NoiseKey(
                self.recipe.run.seed,
                plan.iteration,
                batch.child_step,
                part.first_prompt + batch.child_prompt,
                batch.node,
                batch.parent,
            )
        reference = None
        if update.kl_weight > 0:
            keep = keeps_reference_velocities(self.recipe, plan, bool(self.weights.sharded))
            reference = part.reference_velocity(self.runner, batch, keep)
        v, v_uncond, scale = part.velocity(self.runner, batch)
        with span("grpo_loss", OPS, len(batch)):
            result, grad_v, grad_uncond = grpo_loss_and_grad(
                x, v, states[batch.child], batch.coef, None if on_policy else rolled_logp, batch.advantage,
                batch.weight, clip_range=update.clip_range, child_offsets=batch.offsets,
                ratio="guard" if guard else "density", key=key,
                sibling_correlation=plan.sibling_correlation if guard else 0.0, v_ref=reference,
                kl_weight=update.kl_weight, v_uncond=v_uncond, guidance_scale=scale,
            )  # fmt: skip
        with span("backward", TRANSFORMER, len(batch), part.tokens_of(batch)):
            if v_uncond is None or not v_uncond.requires_grad:
                v.backward(grad_v)
            else:
                torch.autograd.backward([v, v_uncond], [grad_v, grad_uncond])
        stats.train_passes += len(batch)
        stats.loss.append(result.loss.detach())
        stats.ratio.append(result.ratio)
        stats.clipped.append(result.clipped)
        stats.log_ratio.append(result.logp - rolled_logp)
        if on_policy:
            stats.drift.append(result.logp - rolled_logp)

    def gradient(self, batches: list[tuple[Rolled, MicroBatch]]) -> int:
        """Leaves this rank's gradient of these passes, as of a first update; returns the rows whose backward ran. Ranks
        that have divided the weights call it together, each with the passes that it has.
        """
        stats = UpdateStats()
        if self.weights.sharded:
            with self._meeting():
                self._passes_in_meetings(batches, stats, on_policy=True)
        else:
            self._passes(batches, stats, on_policy=True)
        return stats.train_passes

    def step(self) -> None:
        """A step of the optimiser by the gradients that are there, outside an iteration: what one takes is measured."""
        self._step(UpdateStats(), True, 0, 0, 1)

    def _step(self, stats: UpdateStats, trained: bool, iteration: int, number: int, updates: int) -> None:
        """The optimiser step of update `number` of the `updates` of an iteration. A gradient that is not finite skips
        it, decided on the device: weights, moments, their count of steps and the average stay as they are, on all ranks
        alike, as the gradient is the sum of all. Without edges there is nothing to step.
        """
        if not trained:
            return
        self.ranks.sum_gradients(self._whole)
        norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, iteration * updates + number, updates)
        found_inf = (~torch.isfinite(norm)).to(torch.float32)
        # an attribute that every optimiser's step reads and no annotation knows
        setattr(self.optimizer, "found_inf", found_inf)  # noqa: B010
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.weights.refresh()
        if self.ema is not None:
            self.ema.update(found_inf)
        stats.grad_norm.append(norm)
        stats.skipped.append(found_inf)

    def _clip(self) -> Tensor:
        """Scales the gradients of all weights down to update.max_grad_norm; returns their norm before."""
        most, divided = self.recipe.update.max_grad_norm, [p.grad for p in self._divided if p.grad is not None]
        if not self.weights.pieces:
            return torch.nn.utils.clip_grad_norm_(self.parameters, most)
        zero = self.parameters[0].new_zeros(1)
        mine = torch.nn.utils.get_total_norm([zero, *divided])
        whole = torch.nn.utils.get_total_norm([zero, *(p.grad for p in self._whole if p.grad is not None)])
        with self.ranks.meeting(), span("norm", COMMUNICATION):
            norm = torch.hypot(whole, self.weights.sharded[0].norm(mine))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, most, norm)
        return norm


def learning_rate(recipe: Recipe, number: int, updates: int) -> float:
    """The rate of update `number` (0-based, counted over the run), of `updates` an iteration:
    linear warm-up over `warmup` updates, then constant or a cosine to 0 at the end.
    """
    update = recipe.update
    share = number / (recipe.run.iterations * updates)
    decay = 0.5 * (1 + math.cos(math.pi * share)) if update.lr_schedule == "cosine" else 1.0
    return update.lr * decay * min(1.0, (number + 1) / (update.warmup + 1))
