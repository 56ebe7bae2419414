"""How far `flowgrove plan --time` is from iterations that are measured, on a CPU: for each recipe tune, predict, run.

    python profiling/plan_error.py

takes about five minutes on two cores and writes profiling/figures/plan_error_cpu.csv. Nothing else may run meanwhile.
"""

import argparse
import csv
import os
import statistics
import tempfile
from pathlib import Path

from flowgrove.cost.run_time import RunTime, predict_time
from flowgrove.device import pick_backend, pick_device
from flowgrove.machine import describe
from flowgrove.plan.division import ALONE
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.tuning.tune import tune_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("shapes_mix", "shapes_branch_mix_flash", "shapes_dance")
# stages of a metrics line, each with those of a prediction
STAGES = {"rollout": ("rollout",), "reward": ("decode", "rewards"), "update": ("update", "optimiser")}


def main() -> None:
    """Writes a row for every recipe and stage, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names in recipes/")
    parser.add_argument("--iterations", type=int, default=5, help="measured ones of each, after one that is not")
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "figures" / "plan_error_cpu.csv")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # every recipe is predicted by its own tuning
        for name in options.recipes:
            rows += errors_of(ROOT / "recipes" / f"{name}.yaml", Path(folder), options.iterations)
            for row in rows[-len(STAGES) - 2 :]:
                seconds = f"{row['predicted_s']:>10}{row['measured_s']:>10}"
                print(f"{row['recipe']:<26}{row['stage']:<10}{seconds}{float(str(row['error'])):>+9.1%}", flush=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def errors_of(recipe: Path, folder: Path, iterations: int) -> list[dict[str, object]]:
    """Tunes, predicts the tuned recipe, and measures its first iterations."""
    tuned = tune_recipe(recipe, (), folder / recipe.name, False, lambda text: None)
    setup = Setup(load_recipe(tuned))
    predicted = seconds_predicted(predict_time(setup, ALONE), setup.recipe.data.prompts_per_iteration)
    measured = seconds_measured(setup, folder / recipe.stem, iterations)
    machine = describe(pick_device(setup.recipe))
    where = {key: machine[key] for key in ("device", "threads", "torch", "date")}
    return [
        {
            "recipe": recipe.stem,
            "stage": stage,
            "predicted_s": f"{seconds:.4g}",
            "measured_s": f"{measured[stage]:.4g}",
            "error": f"{seconds / measured[stage] - 1:.3f}",
            "iterations": iterations,
            **where,
        }
        for stage, seconds in predicted.items()
    ]


def seconds_predicted(found: RunTime, prompts: int) -> dict[str, float]:
    """Those of the first iterations by stage, and of all stages. Their prompts are new, so that each is encoded."""
    spent = found.iterations[0].spent.seconds
    seconds = {"plan": (found.encoding or 0.0) * prompts / found.texts}
    seconds |= {stage: sum(spent[part] or 0.0 for part in parts) for stage, parts in STAGES.items()}
    return seconds | {"iteration": sum(seconds.values())}


def seconds_measured(setup: Setup, folder: Path, iterations: int) -> dict[str, float]:
    """Medians of the same stages of iterations after one that warms up, and of whole iterations."""
    trainer = Trainer(setup, folder)
    with pick_backend(setup.recipe):
        lines = [trainer.iterate(number)["seconds"] for number in range(iterations + 1)][1:]
    stages = {stage: statistics.median(line[stage] for line in lines) for stage in ("plan", *STAGES)}
    return stages | {"iteration": statistics.median(sum(line.values()) for line in lines)}


if __name__ == "__main__":
    main()
