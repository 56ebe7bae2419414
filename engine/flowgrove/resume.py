"""Where a run goes on: which checkpoint fits which recipe."""

import hashlib
import json
from pathlib import Path

from flowgrove.checkpoint import newest_checkpoint, read_state, valid_checkpoints
from flowgrove.data import read_prompts
from flowgrove.errors import UserError
from flowgrove.metrics import read_metrics
from flowgrove.recipe import Recipe

# what a run may change when it goes on: where things are and how they are computed, not what
_OPERATION = {
    "model": ("gradient_checkpointing", "vae_tiling"),
    "data": ("embedding_cache", "prompt_key"),
    "engine": ("token_budget", "device", "backend", "attention", "compile", "cuda_graphs", "reuse_rollout_graph"),
}
_REWARD_OPERATION = (
    "path", "processor", "clip", "tokenizer", "file", "batch_size", "dtype", "url", "timeout", "retries", "concurrency", "max_answer_mb", "key_variable",
)  # fmt: skip


def fingerprint(recipe: Recipe) -> str:
    """A hash of what decides the weights: all but the run's length, folder, logging and evaluation, and with the prompts' text for their path.

    Keys at their default do not enter, so that a version with new keys resumes old runs.
    """
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    content["data"] = {**content["data"], "prompts": read_prompts(recipe.data.prompts, "data.prompts", recipe.data.prompt_key), "eval_prompts": None}
    content["model"]["path"] = Path(recipe.model.path).name  # where it lies is no matter
    for section, keys in _OPERATION.items():
        for key in keys:
            content.get(section, {}).pop(key, None)
    for reward in content["reward"]:
        for key in _REWARD_OPERATION:
            reward.pop(key, None)
    content["run"] = {"seed": recipe.run.seed}
    if recipe.update.lr_schedule == "cosine":
        content["run"]["iterations"] = recipe.run.iterations
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def finished(recipe: Recipe, out: Path) -> bool:
    """Whether `out` holds all of the recipe's run: its last checkpoint, every line and the report. Reads no model."""
    folder = newest_checkpoint(out)
    if folder is None or not (out / "report.html").exists():
        return False
    state = read_state(folder)
    done = state["completed_iterations"]
    return state["recipe"] == fingerprint(recipe) and recipe.run.iterations <= done <= len(read_metrics(out))


def choose_checkpoint(recipe: Recipe, out: Path, resume: str) -> Path | None:
    """The checkpoint to start from. Raises UserError if `out` holds a run that may not be touched, or `resume` names no checkpoint."""
    holds_run = (out / "metrics.jsonl").exists() or bool(valid_checkpoints(out))
    if resume not in ("auto", "never"):
        chosen = Path(resume)
        inside = chosen.resolve().parent.parent == out.resolve()
        if holds_run and not inside:
            raise UserError(f"{out} holds a run, and {chosen} is no checkpoint of it: give another --out")
        if inside and read_state(chosen)["recipe"] != fingerprint(recipe):
            raise UserError(f"{chosen} was written by another recipe: train on from it into another --out, or resume with {out / 'recipe.yaml'}")
        return chosen
    if resume == "never":
        if holds_run:
            raise UserError(f"{out} holds a run: give another --out, or --resume auto to go on with it")
        return None
    folder = newest_checkpoint(out)
    if folder is not None and read_state(folder)["recipe"] != fingerprint(recipe):
        raise UserError(f"{out} holds a run of another recipe: give another --out, or resume with {out / 'recipe.yaml'}")
    return folder


def stored_budget(checkpoint: Path | None, own: str) -> int | None:
    """Tokens per pass of the run that goes on from `checkpoint`; None for a new run, a checkpoint of another recipe than that of fingerprint `own`, and
    one from before they were stored."""
    state = {} if checkpoint is None else read_state(checkpoint)
    tokens = state.get("token_budget")
    return tokens if state.get("recipe") == own and isinstance(tokens, int) and tokens > 0 else None
