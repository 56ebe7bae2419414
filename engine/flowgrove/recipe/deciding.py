"""Which keys of a recipe decide the weights, and which only where things are and how they are computed: a run may
change the second kind when it goes on.
"""

from pathlib import Path
from typing import Any

from flowgrove.recipe.schema import Recipe

_OPERATION = {
    "model": ("gradient_checkpointing", "vae_tiling"),
    "data": ("embedding_cache", "prompt_key"),
    "engine": (
        "token_budget",
        "device",
        "backend",
        "attention",
        "split_lengths",
        "compile",
        "cuda_graphs",
        "reuse_rollout_graph",
        "ahead",
        "distributed",
        "reshard_after_forward",
        "shard_degree",
    ),
}
_REWARD_OPERATION = (
    "path", "processor", "clip", "tokenizer", "file", "batch_size", "dtype", "url", "timeout", "retries", "concurrency",
    "max_answer_mb", "key_variable",
)  # fmt: skip


def judges(recipe: Recipe) -> list[dict[str, Any]]:
    """What the held-out reward is the sum of, as JSON values, whatever its parts are called."""
    return [reward.model_dump(mode="json", exclude={"label"}) for reward in recipe.reward]


def deciding(recipe: Recipe, exclude_defaults: bool) -> dict[str, Any]:
    """What decides the weights, as JSON values, without the prompts' text."""
    content = recipe.model_dump(mode="json", exclude_defaults=exclude_defaults)
    content["model"]["path"] = Path(recipe.model.path).name  # where it lies is no matter
    if recipe.model.init_lora is not None:
        content["model"]["init_lora"]["path"] = Path(recipe.model.init_lora.path).name
    for section, keys in _OPERATION.items():
        for key in keys:
            content.get(section, {}).pop(key, None)
    for reward in content["reward"]:
        for key in ("label", *_REWARD_OPERATION):
            reward.pop(key, None)
    content["run"] = {"seed": recipe.run.seed}
    if recipe.update.lr_schedule == "cosine":
        content["run"]["iterations"] = recipe.run.iterations
    return content
