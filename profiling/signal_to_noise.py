"""How much of a recipe's gradient is signal, of the untrained model: of every trained step, and per cost of an
iteration.

`python profiling/signal_to_noise.py recipes/shapes_*.yaml --repeats 60 --out profiling/figures/signal_to_noise.csv`

The policy stands still, so that gradients of different repeats (other seeds: other prompts and noise) are independent
estimates of one gradient, and the signal is the mean inner product over all pairs of them: its error falls with the
number of repeats, where that of a run's own measurements falls with the root of it. Writes a table, and beside it a
picture of the signal to noise of an iteration's gradient for as many weighted passes (rollout forwards + 3 × train
passes): where updates are mostly noise, that is what a recipe learns by.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from doc_figures.signal_to_noise import PER, plot
from flowgrove.data.prompts import prompts_of_iteration
from flowgrove.device import pick_backend, pick_device, to_host
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.plan.planner import weighted_passes
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup
from flowgrove.trainer import checked_rewards
from flowgrove.update.gradient_noise import Groups, group_gradients
from flowgrove.update.noise_estimates import estimate, product, student
from flowgrove.update.passes import Rolled, Whole
from flowgrove.update.sketch import Sketch
from flowgrove.update.updater import Updater, UpdateStats


class Still(Updater):
    """Keeps what it should train on."""

    def run(self, parts: list[Rolled], whole: Whole | None = None) -> UpdateStats:
        """No update."""
        self.parts = parts
        return UpdateStats()


def measure(recipe: Recipe, name: str, repeats: int, first_seed: int = 1) -> list[dict[str, Any]]:
    """A row for all steps together and for each: signal to noise of an iteration's gradient with half of its 95 %
    interval, and the shares of signal and noise."""
    setup = Setup(recipe)
    device, count = pick_device(recipe), recipe.data.prompts_per_iteration
    policy = Policy.load(recipe, device, setup.prompts)
    runner, rewards = PassRunner.of(recipe, policy), checked_rewards(setup)
    sketch = Sketch("signal", device, policy.state_dtype)

    found: dict[int, list[Tensor]] = {}  # step → [groups, buckets] for every repeat
    sizes: list[np.ndarray] = []
    costs = []
    for seed in range(first_seed, first_seed + repeats):
        seeded = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        still = Still(seeded, policy, runner)
        stages = Stages(Setup(seeded), policy, still, rewards)
        with pick_backend(recipe):
            line = stages.run(prompts_of_iteration(setup.prompts, 0, count, seed), 0)
            groups = Groups.among(np.ones(count, dtype=bool))
            plan = still.parts[0].forest.plan
            selected = sum(int(edges.trains.sum()) for part in still.parts for edges in part.credit.values())
            scale = count / max(selected, 1)
            sums, _ = group_gradients(
                still, plan, still.parts, groups, scale, sketch.buckets, lambda: sketch(policy.weights.own_gradients())
            )
        for step, one in zip(plan.trained_steps, to_host(sums.sum(2)), strict=True):
            found.setdefault(step.index, [torch.zeros_like(one)] * len(sizes)).append(one)
        sizes.append(groups.prompts)
        for each in found.values():  # steps that this repeat has not trained
            each.extend([torch.zeros_like(each[0])] * (len(sizes) - len(each)))
        costs.append(weighted_passes(line["rollout_forwards"], plan.counts.train_passes * count))
    prompts = np.concatenate(sizes).astype(np.float64)
    steps = {str(step): torch.cat(found[step]).double().numpy() for step in sorted(found)}
    gradients = {"all": sum(steps.values()), **steps}
    estimates = {key: estimate(one, prompts) for key, one in gradients.items()}
    cost, noise = float(np.mean(costs)), sum(estimates[key].noise for key in steps)
    rows = []
    for key, one in estimates.items():
        per = count / one.noise if one.noise > 0 else 0.0
        interval = student(len(prompts) - 1) * one.snr_error * count / prompts.sum()
        part = product(gradients[key], gradients["all"], prompts)
        rows.append({
            "recipe": name, "step": key, "repeats": repeats, "prompts": count, "weighted_passes": round(cost),
            "snr": f"{per * one.signal:.5f}", "interval": f"{interval:.5f}",
            "signal_share": f"{part / estimates['all'].signal:.4f}",
            "noise_share": f"{one.noise / noise if noise else 0:.4f}",
            f"snr_per_{PER}": f"{PER / cost * per * one.signal:.5f}",
            f"interval_per_{PER}": f"{PER / cost * interval:.5f}",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--repeats", type=int, default=60, help="iterations of each, of other seeds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as flowgrove train has it")
    parser.add_argument("--out", type=Path, default=Path("signal_to_noise.csv"))
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in asked.recipes:
        rows += measure(load_recipe(path, tuple(asked.set)), path.stem, asked.repeats)
        told = next(row for row in reversed(rows) if row["step"] == "all")
        print(f"{path.stem}: signal to noise {told['snr']} ± {told['interval']}", flush=True)
        with asked.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    plot(rows, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
