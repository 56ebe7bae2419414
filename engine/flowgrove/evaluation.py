"""Evaluation and sampling: the plain ODE with fixed seeds, through the same plan and rollout as training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import RolloutPlan
from flowgrove.plan.sigmas import round_half_up
from flowgrove.ranks import Ranks
from flowgrove.rewards.faults import Faults, numbered
from flowgrove.rewards.pixels import shrink
from flowgrove.rewards.registry import WEIGHTED_SUM, Rewards
from flowgrove.rewards.scoring import PIXELS_AT_ONCE
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove.spans import span

_PROMPTS_AT_ONCE = 32
COMPARED_PROMPTS = 4  # whose rollouts are run in both precisions
EVAL_ITERATION = 2**32 - 1  # the reserved iteration word of evaluation noise


@dataclass(frozen=True)
class Evaluated:
    """Pictures [prompts · samples, 3, h, w] on the CPU, as small as a grid shows them, their prompts, and scores
    float64 [prompts · samples, rewards], first those that train. NaN are all of a prompt's that one of these could not
    score, and of another reward's those of a prompt that it could not. `distance`: what `rollout_distance` finds, where
    a run has a rollout.precision or rollout.attention.
    """

    pictures: Tensor
    prompts: list[str]
    scores: Tensor
    distance: float | None = None

    def weighted(self, weights: list[float]) -> float | None:
        """Mean over the pictures that were scored of the sum of the rewards that train, whose `weights` these are; None
        if there are none.
        """
        scored = self._sums(weights)
        return float(scored.mean()) if len(scored) else None

    def _sums(self, weights: list[float]) -> Tensor:
        scores = self.scores[:, : len(weights)]
        return scores[scores.isfinite().all(1)] @ torch.tensor(weights, dtype=torch.float64)

    def estimates(self, names: list[str], weights: list[float], samples: int) -> dict[str, dict[str, float]]:
        """{reward: {mean, confidence}} and "weighted_sum" of those that train, whose `weights` these are, of `samples`
        pictures a prompt: means over the prompts that were scored, and half of their 95 % confidence intervals, in
        which a prompt counts once, since its pictures are not independent. 0 with a single prompt, which tells nothing
        of the spread. A reward that scored no prompt is left out; empty if it is one that trains.
        """
        columns = {name: scores[scores.isfinite()] for name, scores in zip(names, self.scores.T, strict=True)}
        columns[WEIGHTED_SUM] = self._sums(weights)
        if not len(columns[WEIGHTED_SUM]):
            return {}
        estimates = {}
        for name, scores in columns.items():
            if not len(scores):
                continue
            per_prompt = scores.view(-1, samples).mean(1)
            spread = per_prompt.std().item() if len(per_prompt) > 1 else 0.0
            estimates[name] = {"mean": per_prompt.mean().item(), "confidence": 1.96 * spread / len(per_prompt) ** 0.5}
        return estimates


def prompts_at_once(pixels: int) -> int:
    """How many prompts are drawn together, with so many pixels in all samples of one."""
    return max(1, min(_PROMPTS_AT_ONCE, PIXELS_AT_ONCE // pixels))


def draw(
    setup: Setup, policy: Policy, runner: PassRunner, prompts: list[str], first_prompt: int = 0
) -> Iterator[Tensor]:
    """Pictures fp32 [some prompts · run.eval.samples, 3, H, W] (videos [..., F, 3, H, W]) on the device, prompt after
    prompt, some prompts at a time.

    `first_prompt`: the number of the first prompt, which names its noise.
    """
    recipe, plan = setup.recipe, setup.eval_plan
    settings = recipe.run.eval
    coefficients = plan_coefficients(plan).to(policy.device, non_blocking=True)
    tuned_steps = None if settings.tuned_share == 1 else round_half_up(settings.tuned_share * len(plan.steps))
    policy = policy.guided_by(settings.guidance_scale)
    some = prompts_at_once(policy.adapter.geometry.pixels * settings.samples)
    for start in range(0, len(prompts), some):
        encoded = policy.encode(prompts[start : start + some])
        with span("rollout"):
            forest = rollout(
                plan,
                coefficients,
                policy,
                encoded,
                runner,
                seed=recipe.run.seed,
                iteration=EVAL_ITERATION,
                first_prompt=first_prompt + start,
                tuned_steps=tuned_steps,
            )
        yield runner.decode(policy, forest.leaves)


def sample(setup: Setup, policy: Policy, runner: PassRunner, prompts: list[str], first_prompt: int = 0) -> Tensor:
    """All that `draw` gives, [len(prompts) · run.eval.samples, 3, H, W], on the CPU;
    the same call gives the same pictures.
    """
    return torch.cat([to_host(pictures) for pictures in draw(setup, policy, runner, prompts, first_prompt)])


def evaluate(
    setup: Setup,
    policy: Policy,
    runner: PassRunner,
    rewards: Rewards,
    prompts: list[str],
    between: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
    faults: Faults | None = None,
) -> Evaluated:
    """Samples the held-out prompts and scores them, some at a time; `between` is called after each, and may raise.

    Each of the `ranks` takes its share of the prompts; all return all pictures and scores. What could not be scored is
    an error, or with `faults` noted there.
    """
    ranks = ranks or Ranks()
    samples, share = setup.recipe.run.eval.samples, ranks.share(len(prompts))
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    numbers = numbered(repeated, samples)
    small: list[Tensor] = []
    scores: list[Tensor] = []

    def draw_and_score() -> None:
        done = share.start * samples
        for pictures in draw(setup, policy, runner, prompts[share], share.start):
            with span("reward", rows=len(pictures)):
                mine = slice(done, done + len(pictures))
                scores.append(rewards(pictures, repeated[mine], faults, numbers=numbers[mine]))
            small.append(to_host(shrink(pictures)).nan_to_num())
            done += len(pictures)
            between()

    with span("evaluation"):
        with policy.weights.gathered(reference=setup.recipe.run.eval.tuned_share < 1):
            ranks.together(draw_and_score)
        found = ranks.gather_all(scores)
        of_prompts, trained = found.view(-1, samples, found.shape[1]), len(rewards.weights)
        columns = (slice(0, trained), *(slice(column, column + 1) for column in range(trained, found.shape[1])))
        for some in columns:
            of_prompts[~of_prompts[..., some].isfinite().flatten(1).all(1), :, some] = torch.nan
        return Evaluated(ranks.gather_all(small), repeated, found)


def rollout_distance(
    setup: Setup, policy: Policy, runner: PassRunner, prompts: list[str], ranks: Ranks | None = None
) -> float:
    """What rollout.precision and rollout.attention change: the distance of final latents to those of the same noise
    without them, ‖x − x_full‖ / ‖x_full‖, as the mean over the leaves of the first few `prompts` by the
    plan of iteration 0.

    Each of the `ranks` takes its share of these prompts; all return the same.
    """
    ranks, plan = ranks or Ranks(), setup.first_plan
    some = prompts[:COMPARED_PROMPTS]
    mine = ranks.share(len(some))
    coefficients = plan_coefficients(plan).to(policy.device, non_blocking=True)

    def leaves(plan: RolloutPlan, encoded: Prompts) -> Tensor:
        seed, first = setup.recipe.run.seed, mine.start
        return rollout(
            plan, coefficients, policy, encoded, runner, seed=seed, iteration=EVAL_ITERATION, first_prompt=first
        ).leaves.flatten(1)

    def compare() -> list[Tensor]:
        if not some[mine]:
            return []
        encoded = policy.encode(some[mine])
        full, cheap = (leaves(each, encoded) for each in (plan.uncheapened, plan))
        return [to_host((cheap - full).norm(dim=1) / full.norm(dim=1)).double()]

    with span("rollout_distance"), runner.launching():
        return float(ranks.gather_all(ranks.together(compare)).mean())
