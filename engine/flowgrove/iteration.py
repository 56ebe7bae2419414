"""One iteration: plan → rollout → reward → credit → update, and the line that tells of it."""

from typing import Any

from flowgrove import metrics
from flowgrove.credit import advantage_by_step, assign_credit
from flowgrove.evaluation import score_leaves
from flowgrove.forest import leaf_path_logp
from flowgrove.models.policy import Policy
from flowgrove.plan import make_plan
from flowgrove.recipe import Recipe
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout import rollout
from flowgrove.rows import plan_rows
from flowgrove.sigmas import SigmaTable
from flowgrove.spans import Clock
from flowgrove.update import Updater


def run_iteration(recipe: Recipe, policy: Policy, updater: Updater, rewards: Rewards, table: SigmaTable, texts: list[str], iteration: int) -> dict[str, Any]:
    """Trains on `texts` and returns the metrics line."""
    clock = Clock(policy.device)
    with clock("plan"):
        plan = make_plan(recipe, iteration, table)
        rows = plan_rows(plan).to(policy.device)
        prompts = policy.encode(texts)
    with clock("rollout"):
        forest = rollout(plan, rows, policy, prompts, seed=recipe.run.seed, iteration=iteration, share=recipe.engine.share)
    with clock("reward"):
        scores = score_leaves(policy, rewards, forest.leaves, [text for text in texts for _ in range(plan.leaves)])
    with clock("credit"):
        grouped = scores.view(len(texts), plan.leaves, -1).numpy()
        path_logp = leaf_path_logp(forest).double().cpu().numpy() if recipe.credit.fusion_beta else None
        credit = assign_credit(plan, recipe.credit, grouped, rewards.weights, path_logp)
    with clock("update"):
        stats = updater.run(forest, prompts, credit, rows)
    counts = plan.counts
    return {
        "iteration": iteration,
        "reward": metrics.reward_summary(list(rewards.scorers), scores),
        **metrics.update_summary(stats),
        "advantage_by_step": advantage_by_step(credit),
        "rollout_forwards": (counts.rollout_forwards if recipe.engine.share else counts.unshared_rollout_forwards) * len(texts),
        "train_passes": stats.train_passes,
        "seconds": clock.seconds,
        "samples_per_second": len(scores) / sum(clock.seconds.values()),
        "peak_memory_bytes": metrics.peak_memory(policy.device),
    }
