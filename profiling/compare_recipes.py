"""The shapes_* recipes side by side: what each reaches, and what it costs against its own published loop.

`python profiling/compare_recipes.py rewards` trains every recipe on several seeds and
writes the held-out reward before and after.
`python profiling/compare_recipes.py timings` times some iterations of each and of its published loop (as `flowgrove
bench engine` has it: the authors' own batch and sharing, ops in eager PyTorch), in turn, and writes forwards, passes
and seconds per iteration. Run it on an idle machine.
"""

import argparse
import csv
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from flowgrove.bench.engine import LOOP, PUBLISHED, REUSED
from flowgrove.data.prompts import prompts_of_iteration
from flowgrove.device import pick_backend
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.lines import evaluations
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.tuning.pass_times import Passes

ROOT = Path(__file__).parents[1]
NAMES = ("dance", "flow", "flow_fast", "mix", "mix_flash", "branch", "branch_mix", "branch_mix_flash")


def train(name: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics lines of a run in a temporary folder."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(ROOT / "recipes" / f"shapes_{name}.yaml", ("run.log=[jsonl]", *overrides))
        Trainer(Setup(recipe), Path(folder)).run(lines.append)
    return lines


def rewards(name: str, seeds: list[int]) -> dict[str, Any]:
    """Median over seeds of the held-out reward of the base model and of the trained one."""
    runs = [
        train(name, f"run.seed={seed}", "run.eval_every=1000") for seed in seeds
    ]  # before the first and after the last iteration
    before, after = ([evaluations(lines)[place][1] for lines in runs] for place in (0, -1))
    return {
        "recipe": f"shapes_{name}",
        "iterations": len(runs[0]),
        "before": f"{statistics.median(before):.3f}",
        "after": f"{statistics.median(after):.3f}",
        "after_each_seed": " ".join(f"{value:.3f}" for value in after),
    }


def timings(name: str, iterations: list[int]) -> dict[str, Any]:
    """Passes and seconds of an iteration, the mean over `iterations` (windows move), ours and the published loop in
    turn on one model."""
    recipe = load_recipe(ROOT / "recipes" / f"shapes_{name}.yaml", ("run.log=[jsonl]", "run.eval_every=0"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Setup(recipe), Path(folder))
    policy, runner, published = trainer.policy, trainer.runner, PUBLISHED[name]
    own = runner.budget.tokens
    sides = [(lever, lever.stages(recipe, published, policy, runner, trainer.rewards)) for lever in (REUSED, LOOP)]

    def iterate(side: int, iteration: int) -> dict[str, Any]:
        lever, stages = sides[side]
        prompts, count = trainer.setup.prompts, recipe.data.prompts_per_iteration
        texts = prompts_of_iteration(prompts, iteration, count, recipe.run.seed)
        lever.set_budget(published, policy, runner.budget, texts, own)
        with pick_backend(stages.recipe):
            return stages.run(texts, iteration)

    iterate(0, 0)  # warms caches up
    passes = Passes(policy, runner)
    per_row = passes.timed(runner.budget.rows, 3)
    passes.release()
    pairs = [[iterate(side, iteration) for side in (0, 1)] for iteration in iterations]
    row: dict[str, Any] = {"recipe": f"shapes_{name}", "iterations": " ".join(map(str, iterations))}
    seconds, costs = [], []
    for side, prefix in enumerate(("", "published_")):
        lines = [pair[side] for pair in pairs]
        forwards = statistics.mean(line["rollout_forwards"] for line in lines)
        trained = statistics.mean(line["train_passes"] for line in lines)
        seconds.append(statistics.mean(sum(line["seconds"].values()) for line in lines))
        costs.append(forwards * per_row.forward + trained * per_row.train)
        row |= {f"{prefix}rollout_forwards": round(forwards), f"{prefix}train_passes": round(trained)}
        row[f"{prefix}seconds"] = f"{seconds[-1]:.2f}"
    (ours, loop), (our_rows, loop_rows) = seconds, costs
    row["published_rows_per_pass"] = published.rows
    row |= {"row_forward_ms": f"{1e3 * per_row.forward:.3f}", "row_train_ms": f"{1e3 * per_row.train:.3f}"}
    return {**row, "rows_speedup": f"{loop_rows / our_rows:.2f}", "speedup": f"{loop / ours:.2f}"}


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
