"""The optimiser updates of one iteration: packed passes, one fused loss and gradient each, one optimiser step per update."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowgrove.credit import EdgeCredit
from flowgrove.ema import Ema
from flowgrove.forest import Forest
from flowgrove.models.policy import Policy, Prompts
from flowgrove.optimizers import make_optimizer
from flowgrove.packing import MicroBatch, edges_of_update, micro_batches, pass_bounds
from flowgrove.plan import RolloutPlan
from flowgrove.recipe import Recipe
from flowgrove.rows import plan_rows
from flowgrove.spans import span
from flowgrove_kernels import NoiseKey, StepCoefficients, flow_logprob, grpo_loss_and_grad
from flowgrove_kernels.affine import guided


@dataclass
class UpdateStats:
    """What an iteration's updates leave for the metrics: per pass, tensors on the device that are read once at its end."""

    ratio: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    log_ratio: list[Tensor] = field(default_factory=list)
    loss: list[Tensor] = field(default_factory=list)
    drift: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    train_passes: int = 0


class Updater:
    """Owns the optimiser. One call trains on one iteration's forest."""

    def __init__(self, recipe: Recipe, policy: Policy) -> None:
        self.recipe, self.policy = recipe, policy
        update = recipe.update
        self.parameters = list(policy.trainable().values())
        self.optimizer = make_optimizer(update, self.parameters, policy.device)
        self.ema = None if update.ema_decay is None else Ema(policy.trainable(), update.ema_decay)

    def run(self, forest: Forest, prompts: Prompts, credit: dict[int, EdgeCredit], rows: StepCoefficients, first_prompt: int = 0) -> UpdateStats:
        """All updates of the iteration. `rows`: the plan's rows on the device."""
        update, plan, stats = self.recipe.update, forest.plan, UpdateStats()
        weights = step_weights(plan, update.step_weight)
        if not plan.trained_steps:  # pruning may leave an iteration without any
            return stats
        engine = self.recipe.engine
        packing = "edges" if not engine.share else "levels" if engine.exact_replay else "states"
        batches = []
        for number in range(update.updates_per_iteration):
            edges = edges_of_update(forest, credit, number, weights, update.kl_weight > 0, packing)
            batches.append(micro_batches(edges, plan, rows, pass_bounds(edges, self.policy, packing), self.policy.state_dtype))
        if self.policy.compute_dtype == torch.bfloat16 and packing == "states" and update.step_weight != "guard":  # guard needs no logp, replay has it
            self._replay_old_logp(forest, prompts, batches[1:])
        for number, passes in enumerate(batches):
            with span(f"update {number}"):
                for batch in passes:
                    self._backward(forest, prompts, batch, stats, on_policy=number == 0, first_prompt=first_prompt)
                with span("optimizer"):
                    self._step(stats, bool(passes), plan.iteration * update.updates_per_iteration + number)
        return stats

    def _backward(self, forest: Forest, prompts: Prompts, batch: MicroBatch, stats: UpdateStats, on_policy: bool, first_prompt: int) -> None:
        update, plan, policy = self.recipe.update, forest.plan, self.policy
        x, rolled_logp = forest.states[batch.state], forest.logp[batch.child]
        guard = update.step_weight == "guard"
        key = None
        if guard:
            key = NoiseKey(self.recipe.run.seed, plan.iteration, batch.child_step, first_prompt + batch.child_prompt, batch.node, batch.parent)
        reference = None
        if update.kl_weight > 0:
            with span("reference"):
                v_ref, uncond_ref, scale = policy.reference_velocity(x, batch.sigma, prompts, batch.prompt)
                reference = guided(v_ref, uncond_ref, scale or 1.0, policy.state_dtype)
        with span("transformer"):
            v, v_uncond, scale = policy.velocity(x, batch.sigma, prompts, batch.prompt)
        with span("grpo_loss"):
            result, grad_v, grad_uncond = grpo_loss_and_grad(
                x, v, forest.states[batch.child], batch.coef, None if on_policy else rolled_logp, batch.advantage, batch.weight,
                clip_range=update.clip_range, child_offsets=batch.offsets, ratio="guard" if guard else "density", key=key,
                sibling_correlation=plan.sibling_correlation if guard else 0.0, v_ref=reference, kl_weight=update.kl_weight,
                v_uncond=v_uncond, guidance_scale=scale,
            )  # fmt: skip
        with span("backward"):
            if v_uncond is None:
                v.backward(grad_v)
            else:
                torch.autograd.backward([v, v_uncond], [grad_v, grad_uncond])
        stats.train_passes += len(batch.state)
        stats.loss.append(result.loss.detach())
        stats.ratio.append(result.ratio)
        stats.clipped.append(result.clipped)
        stats.log_ratio.append(result.logp - rolled_logp)
        if on_policy:
            stats.drift.append(result.logp - rolled_logp)

    def _step(self, stats: UpdateStats, trained: bool, number: int) -> None:
        """The optimiser step of update `number` of the run; a gradient that is not finite skips it on the device. Without edges there is nothing to step."""
        if not trained:
            return
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.update.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, number)
        setattr(self.optimizer, "found_inf", (~torch.isfinite(norm)).to(torch.float32))  # noqa: B010 (read by every optimiser's step, in no annotation)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        stats.grad_norm.append(norm)

    @torch.no_grad()
    def _replay_old_logp(self, forest: Forest, prompts: Prompts, later: list[list[MicroBatch]]) -> None:
        """bf16 passes depend on their batch: later updates compare with the old policy's logp in the very batches that they train in."""
        for batch in (batch for passes in later for batch in passes):
            x = forest.states[batch.state]
            v, v_uncond, scale = self.policy.velocity(x, batch.sigma, prompts, batch.prompt)
            forest.logp[batch.child] = flow_logprob(
                x, v, forest.states[batch.child], batch.coef, child_offsets=batch.offsets, v_uncond=v_uncond, guidance_scale=scale
            )


def learning_rate(recipe: Recipe, number: int) -> float:
    """The rate of update `number` (0-based, counted over the run): linear warm-up over `warmup` updates, then constant or a cosine to 0 at the end."""
    update = recipe.update
    share = number / (recipe.run.iterations * update.updates_per_iteration)
    decay = 0.5 * (1 + math.cos(math.pi * share)) if update.lr_schedule == "cosine" else 1.0
    return update.lr * decay * min(1.0, (number + 1) / (update.warmup + 1))


def step_weights(plan: RolloutPlan, kind: str) -> dict[int, float]:
    """ω of every trained step: 1; TempFlow-GRPO (2508.04324) ∝ s with mean 1; GRPO-Guard (2510.22319) 1/Δ."""
    if kind == "guard":
        return {step.index: 1.0 / (step.sigma - step.sigma_next) for step in plan.trained_steps}
    if kind == "tempflow":
        table = plan_rows(plan).std.tolist()
        stds = {step.index: table[step.index] for step in plan.trained_steps}
        mean = sum(stds.values()) / max(len(stds), 1)
        return {index: std / mean for index, std in stds.items()}
    return {step.index: 1.0 for step in plan.trained_steps}
