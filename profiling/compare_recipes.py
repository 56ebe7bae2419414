"""Trains the shapes_* recipes on several seeds and times each against its own unshared loop: `python profiling/compare_recipes.py`.

Writes a CSV with one row per recipe: held-out reward before and after (median over seeds), rollout forwards and train passes per iteration, seconds per
iteration (median), and the same for the loop that runs every trajectory and every edge alone (engine.share: false). Timings alternate between the two.
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


def seconds(lines: list[dict[str, Any]]) -> float:
    """Median seconds per iteration, the first left out: it warms caches up."""
    return statistics.median(sum(line["seconds"].values()) for line in lines[1:])


def compare(name: str, seeds: list[int], timed: int) -> dict[str, Any]:
    """One row of the table."""
    runs = [train(name, f"run.seed={seed}") for seed in seeds]
    before, after = ([evaluations(lines)[place][1] for lines in runs] for place in (0, -1))
    short = ("run.eval_every=0", f"run.iterations={timed}")
    pairs = [(train(name, *short), train(name, *short, "engine.share=false")) for _ in range(2)]
    shared, unshared = ([seconds(pair[side]) for pair in pairs] for side in (0, 1))
    lines, loop = pairs[0]
    return {
        "recipe": f"shapes_{name}",
        "held_out_before": round(statistics.median(before), 3),
        "held_out_after": round(statistics.median(after), 3),
        "held_out_after_all": " ".join(f"{value:.3f}" for value in after),
        "rollout_forwards": lines[-1]["rollout_forwards"],
        "train_passes": lines[-1]["train_passes"],
        "seconds": round(min(shared), 3),
        "unshared_rollout_forwards": loop[-1]["rollout_forwards"],
        "unshared_train_passes": loop[-1]["train_passes"],
        "unshared_seconds": round(min(unshared), 3),
        "speedup": round(min(unshared) / min(shared), 2),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--timed", type=int, default=3, help="iterations of each timing run")
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "figures" / "compare_recipes.csv")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.recipes:
        rows.append(compare(name, arguments.seeds, arguments.timed))
        print(rows[-1], flush=True)
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
