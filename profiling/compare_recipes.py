"""The shapes_* recipes side by side: what each reaches, and what it costs against its own unshared loop.

`python profiling/compare_recipes.py rewards` trains every recipe on several seeds and writes the held-out reward before and after.
`python profiling/compare_recipes.py timings` times some iterations of each and of the loop that runs every trajectory and every edge alone
(engine.share: false, engine.token_budget: 1), in turn, and writes forwards, passes and seconds per iteration. Run it on an idle machine.
"""

import argparse
import csv
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from flowgrove.recipe import load_recipe
from flowgrove.report import evaluations
from flowgrove.trainer import Trainer

ROOT = Path(__file__).parents[1]
NAMES = ("dance", "flow", "flow_fast", "mix", "mix_flash", "branch", "branch_mix", "branch_mix_flash")


def train(name: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics lines of a run in a temporary folder."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(ROOT / "recipes" / f"shapes_{name}.yaml", ("run.log=[jsonl]", *overrides))
        Trainer(recipe, Path(folder)).run(lines.append)
    return lines


def rewards(name: str, seeds: list[int]) -> dict[str, Any]:
    """Median over seeds of the held-out reward of the base model and of the trained one."""
    runs = [train(name, f"run.seed={seed}", "run.eval_every=1000") for seed in seeds]  # before the first and after the last iteration
    before, after = ([evaluations(lines)[place][1] for lines in runs] for place in (0, -1))
    return {
        "recipe": f"shapes_{name}",
        "iterations": len(runs[0]),
        "before": f"{statistics.median(before):.3f}",
        "after": f"{statistics.median(after):.3f}",
        "after_each_seed": " ".join(f"{value:.3f}" for value in after),
    }


def timings(name: str, iterations: list[int]) -> dict[str, Any]:
    """Passes and seconds of an iteration, the mean over `iterations` (windows move), shared and unshared in turn in one process."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = []
        for side, engine in (("shared", ()), ("alone", ("engine.share=false", "engine.token_budget=1"))):
            recipe = load_recipe(ROOT / "recipes" / f"shapes_{name}.yaml", ("run.log=[jsonl]", "run.eval_every=0", *engine))
            trainers.append(Trainer(recipe, Path(folder) / side))
        trainers[0].iterate(0)  # warms caches up
        pairs = [[trainer.iterate(iteration) for trainer in trainers] for iteration in iterations]
    row: dict[str, Any] = {"recipe": f"shapes_{name}", "iterations": " ".join(map(str, iterations))}
    means = []
    for side, prefix in enumerate(("", "unshared_")):
        lines = [pair[side] for pair in pairs]
        for key in ("rollout_forwards", "train_passes"):
            row[prefix + key] = round(statistics.mean(line[key] for line in lines))
        means.append(statistics.mean(sum(line["seconds"].values()) for line in lines))
        row[prefix + "seconds"] = f"{means[-1]:.2f}"
    row["speedup"] = f"{means[1] / means[0]:.2f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rewards", "timings"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 10, 20, 30], help="which iterations are timed")
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--out", type=Path, help="default: profiling/figures/compare_WHAT.csv")
    arguments = parser.parse_args()
    out = arguments.out or ROOT / "profiling" / "figures" / f"compare_{arguments.what}.csv"
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = []
    for name in arguments.recipes:
        row = rewards(name, arguments.seeds) if arguments.what == "rewards" else timings(name, arguments.iterations)
        rows.append({**row, "machine": machine})
        print(rows[-1], flush=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
