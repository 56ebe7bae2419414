"""Run folders as training leaves them, with metrics and sample grids of our choice, for tests of the report."""

import json

import torch

from engine_cases import tiny_recipe
from flowgrove.evaluation import Evaluated
from flowgrove.recipe.loading import dump_recipe, load_recipe
from flowgrove.report.grids import save_grid

LINE = {
    "iteration": 0, "reward": {"shapes": {"mean": 0.5, "std": 0.1}}, "ratio_mean": 1.0, "ratio_min": 0.9,
    "ratio_max": 1.1, "clipped_low": 0.1, "clipped_high": 0.1, "approx_kl": 1e-6, "grad_norm": 0.3, "logp_drift": 0.0,
    "rollout_forwards": 20, "train_passes": 10, "seconds": {"rollout": 0.5, "update": 1.0}, "samples_per_second": 5.0,
    "peak_memory_bytes": 2**30,
}  # fmt: skip


def synthetic_run(folder, lines, **changes):
    """A run folder as training leaves it, with metrics of our choice and no grids; and its recipe."""
    recipe = load_recipe(tiny_recipe(folder.parent, **changes))
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return recipe


def grids_in(folder, *evaluations, size=(8, 12)):
    """Saves (iteration, prompts, samples) as grids of a run."""
    for iteration, prompts, samples in evaluations:
        texts = [text for text in prompts for _ in range(samples)]
        pictures = torch.rand(len(texts), 3, *size, generator=torch.Generator().manual_seed(iteration))
        given = Evaluated(
            pictures,
            texts,
            torch.rand(len(texts), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(iteration)),
        )
        save_grid(folder / "samples" / f"iteration_{iteration:06d}.png", given, samples, [1.0])
