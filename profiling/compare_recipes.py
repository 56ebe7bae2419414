"""The shapes_* recipes side by side: what each reaches at equal cost, and what it costs against its own published loop.

`python profiling/compare_recipes.py rewards` is `flowgrove compare` of all of them, at several learning rates, between
which the first seed chooses, over seeds, on one of two tasks: one shape at a place, or two with a relation, which is
harder. It takes hours, and may be interrupted and started again; the tables then go to
profiling/figures/compare_TASK*.csv.
`python profiling/compare_recipes.py timings` times some iterations of each and of its published loop (as `flowgrove
bench engine` has it: the authors' own batch and sharing, ops in eager PyTorch), in turn, and writes forwards, passes
and seconds per iteration. Run them on an idle machine.
"""

import argparse
import csv
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from doc_figures.compared import SEARCH
from flowgrove.bench.engine import LOOP, PUBLISHED, REUSED
from flowgrove.compare.command import check, compare
from flowgrove.compare.runs import comparison_of
from flowgrove.compare.tables import draw_comparison
from flowgrove.data.prompts import prompts_of_iteration
from flowgrove.device import pick_backend
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.tuning.pass_times import Passes

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
FIGURES = ROOT / "profiling" / "figures"
NAMES = ("dance", "flow", "flow_fast", "mix", "mix_flash", "branch", "branch_mix", "branch_mix_flash", "grove")
TASKS = ("shapes", "pairs")


def rewards(task: str, names: list[str], seeds: str, lr: str, cost: str, search: float, runs: Path) -> None:
    """Trains what is missing in the folder `runs`, where the picture stays, and writes compare_TASK.csv (at equal cost)
    and compare_TASK_curves.csv.
    """
    prompts = (
        f"data.{key}={RECIPES / 'prompts' / f'{task}_{part}.txt'}"
        for key, part in (("prompts", "train"), ("eval_prompts", "eval"))
    )
    settings = ("run.log=[jsonl]", "run.eval_every=10", "run.checkpoint_every=50", "run.keep_last=1", *prompts)
    recipes = [RECIPES / f"shapes_{name}.yaml" for name in names]
    asked = comparison_of(recipes, runs / task, settings, seeds, lr, cost=cost, search=search)
    result = compare(asked, None, print, Console(stderr=True, highlight=False))
    draw_comparison(result.found, Console(highlight=False))
    check(result.failures, len(asked.runs))
    for name, target in (("summary.csv", ".csv"), ("curves.csv", "_curves.csv")):
        shutil.copyfile(asked.out / name, FIGURES / f"compare_{task}{target}")


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


def time_all(names: list[str], iterations: list[int]) -> None:
    """Writes compare_timings.csv."""
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = []
    for name in names:
        rows.append({**timings(name, iterations), "machine": machine})
        print(rows[-1], flush=True)
        with (FIGURES / "compare_timings.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    every = sorted(path.stem.removeprefix("shapes_") for path in RECIPES.glob("shapes_*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = parser.add_subparsers(dest="what", required=True)
    reward = whats.add_parser("rewards", help="what each recipe reaches at equal cost")
    reward.add_argument("--task", choices=TASKS, default=TASKS[0])
    reward.add_argument("--recipes", nargs="+", default=every, choices=every, metavar="NAME", help=f"of {every}")
    reward.add_argument("--seeds", default="1,2,3")
    reward.add_argument("--lr", default="1e-4,2e-4,4e-4")
    reward.add_argument("--cost", default="100000,300000", help="in weighted passes, which every run trains to")
    reward.add_argument(
        "--search", type=float, default=SEARCH, help="cost at which the first seed chooses learning rates"
    )
    reward.add_argument("--runs", type=Path, default=Path("runs/comparisons"), help="folder of the runs, which stay")
    timing = whats.add_parser("timings", help="what an iteration of each costs, and of its published loop")
    timing.add_argument("--recipes", nargs="+", default=list(NAMES), choices=NAMES)
    timing.add_argument("--iterations", type=int, nargs="+", default=[0, 10, 20, 30], help="which are timed")
    asked = parser.parse_args()
    if asked.what == "rewards":
        rewards(asked.task, asked.recipes, asked.seeds, asked.lr, asked.cost, asked.search, asked.runs)
    else:
        time_all(asked.recipes, asked.iterations)


if __name__ == "__main__":
    main()
