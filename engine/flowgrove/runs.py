"""Finished runs: open their model, draw with it, export it."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from flowgrove.checkpoint import load_checkpoint, valid_checkpoints
from flowgrove.data import read_prompts
from flowgrove.device import pick_backend, pick_device
from flowgrove.errors import UserError
from flowgrove.evaluation import draw, evaluate
from flowgrove.files import write_file, write_text
from flowgrove.models.policy import Policy
from flowgrove.pixels import to_bytes
from flowgrove.recipe import Recipe, load_recipe
from flowgrove.rewards.registry import Rewards


def open_policy(source: Path, overrides: tuple[str, ...] = ()) -> tuple[Recipe, Policy]:
    """A run folder with its newest checkpoint, or a recipe with its base model. Raises UserError."""
    is_run = source.is_dir()
    checkpoints = valid_checkpoints(source) if is_run else []
    if is_run and not checkpoints:
        raise UserError(f"{source} holds no checkpoint: give the folder of a run that has written one, or a recipe for the base model")
    recipe = load_recipe(source / "recipe.yaml" if is_run else source, overrides)
    untrained = recipe.model_copy(update={"update": recipe.update.model_copy(update={"kl_weight": 0.0})})  # no copy of the reference model
    policy = Policy(untrained, pick_device(recipe))
    if is_run:
        load_checkpoint(checkpoints[-1], policy, None)
    return recipe, policy


def write_samples(recipe: Recipe, policy: Policy, prompts: list[str], out: Path) -> int:
    """Pictures as `out`/NNNN_K.png (prompt N, sample K) and prompts.jsonl; returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    samples = recipe.run.eval.samples
    lines: list[str] = []
    with pick_backend(recipe):
        for pictures in draw(recipe, policy, prompts):
            for pixels in to_bytes(pictures).numpy():
                prompt, number = divmod(len(lines), samples)
                name = f"{prompt:04d}_{number}.png"
                write_file(out / name, Image.fromarray(pixels).save)
                lines.append(json.dumps({"file": name, "prompt": prompts[prompt]}, ensure_ascii=False) + "\n")
    write_text(out / "prompts.jsonl", "".join(lines))
    return len(lines)


def evaluate_run(run: Path) -> dict[str, dict[str, float]]:
    """Rewards of the newest checkpoint on the held-out prompts: {name: {mean, confidence}} (half of the 95 % interval), and "weighted_sum".

    Written to eval.json in the run folder. Raises UserError for a recipe without held-out prompts.
    """
    recipe, policy = open_policy(run)
    if recipe.data.eval_prompts is None:
        raise UserError(f"{run}: its recipe has no data.eval_prompts, so there is nothing to evaluate on")
    rewards = Rewards(recipe)
    with pick_backend(recipe):
        evaluated = evaluate(recipe, policy, rewards, read_prompts(recipe.data.eval_prompts, "data.eval_prompts"))
    columns = dict(zip(rewards.scorers, evaluated.scores.T, strict=True))
    columns["weighted_sum"] = evaluated.scores @ torch.tensor(rewards.weights, dtype=torch.float64)
    samples = recipe.run.eval.samples
    result = {}
    for name, scores in columns.items():
        per_prompt = scores.view(-1, samples).mean(1)  # pictures of one prompt are not independent
        spread = per_prompt.std().item() if len(per_prompt) > 1 else 0.0
        result[name] = {"mean": per_prompt.mean().item(), "confidence": 1.96 * spread / len(per_prompt) ** 0.5}
    write_text(run / "eval.json", json.dumps(result, indent=2) + "\n")
    return result


def export_run(run: Path, out: Path) -> str:
    """Writes the newest checkpoint for diffusers; returns a line that says how to load it."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    if not run.is_dir():
        raise UserError(f"{run} is not a run folder: give the folder that `flowgrove train` wrote")
    recipe, policy = open_policy(run)
    is_lora = recipe.model.lora is not None
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (policy.adapter.save_lora if is_lora else policy.adapter.save_pipeline)(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}; free some space and give the same command again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    load = "pipe.load_lora_weights" if is_lora else "StableDiffusion3Pipeline.from_pretrained"
    return f'wrote a {"LoRA" if is_lora else "pipeline"}: {load}("{out}")'
