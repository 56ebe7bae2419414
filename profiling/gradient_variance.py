"""How noisy each algorithm's gradient is for what it costs, and whether it points the right way: on the mixture of
Gaussians of gaussian_mixture.py, where the true gradient is known.

    python profiling/gradient_variance.py [--iterations 80]

Writes profiling/figures/gradient_variance.csv, in about a minute on one core; `make figures` draws it. The rollouts
are those of recipes/shapes_*.yaml with one update an iteration; credit, weights and loss are the engine's. Of windows
and pruned depths that move it is the mean over their positions in the recipe's run.

Cost is in weighted passes: forwards of the rollout + 3 × training passes. The mean gradient of n iterations has the
squared noise tr Cov/n beside its squared length ‖E‖²; they are equal after n = tr Cov/‖E‖² iterations, whose cost is
`passes_to_signal`. `cosine` is that of E with the true gradient of the expected reward as the recipe samples, in the
steps that it trains; `cosine_ode` with that of the plain ODE in all steps, which evaluations draw with.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrove.bench.table import write_columns
from flowgrove.plan.planner import RolloutPlan, make_plan, weighted_passes
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Recipe
from gaussian_mixture import Forests, true_gradient

ROOT = Path(__file__).parents[1]
CSV = ROOT / "profiling" / "figures" / "gradient_variance.csv"
COLUMNS = (
    "rollouts", "credit", "recipe", "settings", "forwards", "train_passes", "cost", "iterations", "passes_to_signal",
    "passes_to_signal_error", "cosine", "cosine_error", "cosine_ode", "cosine_ode_error",
)  # fmt: skip
POSITIONS = range(0, 40, 5)  # iterations: the shapes' windows and pruned depths move every 5 or 10 of 40
SAMPLES = 200_000  # trajectories of a true gradient
_PARTS = 10  # of the iterations and of the trajectories, for errors
_UNBIASED = (
    "credit.baseline=siblings", "credit.std=none", "update.step_weight=leaves", "rollout.tree.sibling_correlation=0",
)  # fmt: skip


@dataclass(frozen=True)
class Rollouts:
    """How samples are drawn: a shipped recipe with settings."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    tree: bool = False

    def load(self, credit: tuple[str, ...]) -> Recipe:
        settings = ("update.updates_per_iteration=1", *self.settings, *credit)
        return load_recipe(ROOT / "recipes" / f"{self.recipe}.yaml", settings)


@dataclass(frozen=True)
class Credits:
    """How edges are credited, beside what the recipe says; `trees`: a flat group would be credited as by another."""

    name: str
    settings: tuple[str, ...] = ()
    trees: bool = False


_EARLY = ("rollout.tree.splits=[0, 1]", "rollout.tree.fanout=4")
ROLLOUTS = (
    Rollouts("DanceGRPO", "shapes_dance"),
    Rollouts("Flow-GRPO", "shapes_flow"),
    Rollouts("MixGRPO", "shapes_mix"),
    Rollouts("BranchGRPO", "shapes_branch", tree=True),
    Rollouts("BranchGRPO-Mix", "shapes_branch_mix", tree=True),
    Rollouts("Mix, splits 0, 1 into 4", "shapes_branch_mix", _EARLY, tree=True),
    Rollouts("Mix, the same, flow_sde", "shapes_branch_mix", (*_EARLY, "rollout.dynamics=flow_sde"), tree=True),
)
CREDITS = (
    Credits("as published"),
    Credits("std: leaves", ("credit.std=leaves",), trees=True),
    Credits("std: global", ("credit.std=global",)),
    Credits("std: none", ("credit.std=none",)),
    Credits("siblings, std: none, by leaves", _UNBIASED, trees=True),
)


def measure(iterations: int, samples: int = SAMPLES) -> Iterator[dict[str, Any]]:
    """A row for each way to draw and to credit, of `iterations` at each of POSITIONS."""
    forests: dict[object, Forests] = {}
    truths: dict[object, Tensor] = {}
    for rollouts in ROLLOUTS:
        for credits in CREDITS:
            if credits.trees and not rollouts.tree:
                continue
            recipe = rollouts.load(credits.settings)
            plans, together = [make_plan(recipe, position) for position in POSITIONS], recipe.data.prompts_per_iteration
            drawn, own = [], []
            for plan in plans:
                rolled = _rollout_of(plan)
                if (plan.iteration, rolled) not in forests:
                    forests[plan.iteration, rolled] = Forests.grown(plan, iterations * together, seed=plan.iteration)
                of_plan = Forests(plan, iterations * together, forests[plan.iteration, rolled].states)
                each = of_plan.gradients(recipe.credit, recipe.update.step_weight, together)
                drawn.append(each.view(iterations, together, 6).mean(1))
                trajectory = _trajectory_of(plan)
                if trajectory not in truths:
                    truths[trajectory] = true_gradient(plan, samples)
                own.append(truths[trajectory])
            if "ode" not in truths:
                truths["ode"] = true_gradient(plans[0], samples, ode=True)
            yield {
                "rollouts": rollouts.name, "credit": credits.name, "recipe": rollouts.recipe,
                "settings": "; ".join((*rollouts.settings, *credits.settings)),
                **found(plans, together, torch.stack(drawn), torch.stack(own).mean(0), truths["ode"]),
            }  # fmt: skip
        forests.clear()


def _rollout_of(plan: RolloutPlan) -> tuple[object, ...]:
    """What decides the forests of a plan."""
    steps = tuple((step.solver, step.fanout, step.nodes_in) for step in plan.steps)
    return steps, plan.noise_level, plan.sibling_correlation


def _trajectory_of(plan: RolloutPlan) -> tuple[object, ...]:
    """What decides a single trajectory and where its means move."""
    return tuple((step.solver, step.trained) for step in plan.steps), plan.noise_level


def found(plans: list[RolloutPlan], prompts: int, drawn: Tensor, own: Tensor, ode: Tensor) -> dict[str, Any]:
    """What a row says of gradients `drawn` [positions, iterations, 6] beside true ones, `own` and `ode` [batches, 6];
    `prompts`: of an iteration.
    """
    forwards = prompts * sum(plan.counts.rollout_forwards for plan in plans) / len(plans)
    passes = prompts * sum(plan.counts.train_passes for plan in plans) / len(plans)
    cost = weighted_passes(forwards, passes)
    signal, error = _with_error(lambda found, _: cost * _noise_to_signal(found), drawn, own)
    row = {
        "forwards": round(forwards, 1), "train_passes": round(passes, 1), "cost": round(cost, 1),
        "iterations": drawn.shape[0] * drawn.shape[1],
        "passes_to_signal": round(signal), "passes_to_signal_error": round(error),
    }  # fmt: skip
    for name, truth in (("cosine", own), ("cosine_ode", ode)):
        cosine, error = _with_error(_cosine, drawn, truth)
        row |= {name: round(cosine, 4), f"{name}_error": round(error, 4)}
    return row


def _moments(drawn: Tensor) -> tuple[Tensor, float, float]:
    """(mean, its squared length without what noise adds to it, tr Cov of an iteration)."""
    mean, variance = drawn.mean((0, 1)), float(drawn.var(1).sum(-1).mean())
    return mean, float(mean @ mean) - variance / (drawn.shape[0] * drawn.shape[1]), variance


def _noise_to_signal(drawn: Tensor) -> float:
    _, length, variance = _moments(drawn)
    return variance / length


def _cosine(drawn: Tensor, truth: Tensor) -> float:
    (mean, length, _), (target, of_target, _) = _moments(drawn), _moments(truth[None])
    return float(mean @ target) / (length * of_target) ** 0.5


def _with_error(value: Callable[[Tensor, Tensor], float], drawn: Tensor, truth: Tensor) -> tuple[float, float]:
    """`value` of all, and its standard error: a jackknife over shares of the iterations and of the batches at once."""
    parts = zip(_without(drawn, 1), _without(truth, 0), strict=True)
    without = torch.tensor([value(found, true) for found, true in parts])
    return value(drawn, truth), float(((_PARTS - 1) * without.var(correction=0)) ** 0.5)


def _without(values: Tensor, dim: int) -> list[Tensor]:
    """The values without each of _PARTS shares."""
    shares = values.chunk(_PARTS, dim)
    return [torch.cat([other for other in shares if other is not share], dim) for share in shares]


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=80, help="at each position of the windows")
    parser.add_argument("--out", type=Path, default=CSV)
    options = parser.parse_args(arguments)
    rows = []
    for row in measure(options.iterations):
        rows.append(row)
        print(
            f"{row['rollouts']:28} {row['credit']:30} {row['passes_to_signal']:8,} ± {row['passes_to_signal_error']:,} "
            f"passes to signal, cosine {row['cosine']:.3f} ± {row['cosine_error']:.3f}, "
            f"with the ODE's {row['cosine_ode']:.3f} ± {row['cosine_ode_error']:.3f}",
            flush=True,
        )
    write_columns(rows, COLUMNS, options.out)


if __name__ == "__main__":
    main()
