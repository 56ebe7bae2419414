"""Finished runs: open their model, draw with it, export it."""

import json
from pathlib import Path

from PIL import Image

from flowgrove.checkpoint import load_checkpoint, valid_checkpoints
from flowgrove.device import pick_device
from flowgrove.errors import UserError
from flowgrove.evaluation import sample
from flowgrove.models.policy import Policy
from flowgrove.recipe import Recipe, load_recipe
from flowgrove.rewards.jpeg_size import to_bytes
from flowgrove.sigmas import SigmaTable, recipe_sigmas

_PROMPTS_AT_ONCE = 16


def open_policy(source: Path, overrides: tuple[str, ...] = ()) -> tuple[Recipe, Policy, SigmaTable]:
    """A run folder with its newest checkpoint, or a recipe with its base model. Raises UserError."""
    is_run = source.is_dir()
    checkpoints = valid_checkpoints(source) if is_run else []
    if is_run and not checkpoints:
        raise UserError(f"{source} holds no checkpoint: give the folder of a run that has written one, or a recipe for the base model")
    recipe = load_recipe(source / "recipe.yaml" if is_run else source, overrides)
    policy = Policy(recipe, pick_device(recipe))
    if is_run:
        load_checkpoint(checkpoints[-1], policy, None)
    return recipe, policy, recipe_sigmas(recipe)


def write_samples(recipe: Recipe, policy: Policy, prompts: list[str], out: Path, table: SigmaTable) -> int:
    """Pictures as `out`/NNNN_K.png (prompt N, sample K) and prompts.jsonl; returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    samples = recipe.run.eval.samples
    lines = []
    for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
        chunk = prompts[first : first + _PROMPTS_AT_ONCE]
        for index, pixels in enumerate(to_bytes(sample(recipe, policy, chunk, table, first_prompt=first)).numpy()):
            name = f"{first + index // samples:04d}_{index % samples}.png"
            Image.fromarray(pixels).save(out / name)
            lines.append(json.dumps({"file": name, "prompt": chunk[index // samples]}, ensure_ascii=False) + "\n")
    (out / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def export_run(run: Path, out: Path) -> str:
    """Writes the newest checkpoint for diffusers; returns a line that says how to load it."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    recipe, policy, _ = open_policy(run)
    if recipe.model.lora is not None:
        policy.adapter.save_lora(out)
        return f'wrote a LoRA: pipe.load_lora_weights("{out}")'
    policy.adapter.save_pipeline(out)
    return f'wrote a pipeline: StableDiffusion3Pipeline.from_pretrained("{out}")'
