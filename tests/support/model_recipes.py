"""Recipes of every algorithm for every model family."""

import yaml

from engine_cases import TRAIN_PROMPTS
from tiny_families import FAMILIES, MODELS

WINDOW = {"strategy": "progressive", "size": 2, "every": 1}
TREE = {"splits": [0, 1], "fanout": 2}
ALGORITHMS = {
    "dance": {
        "rollout": {"dynamics": "dance_sde", "noise_level": 0.3, "window": {"strategy": "all"}},
        "update": {"step_fraction": 0.6},
    },
    "flow": {"rollout": {"shared_initial_noise": False, "window": {"strategy": "all"}}, "update": {"kl_weight": 0.01}},
    "fast": {"rollout": {"dynamics": "cps", "window": {"strategy": "random", "size": 2, "range": [0, 3]}}},
    "mix": {"rollout": {"window": WINDOW}},
    "mix_flash": {"rollout": {"window": WINDOW, "tail": {"compress": 0.4}}},
    "branch": {"rollout": {"dynamics": "dance_sde", "noise_level": 0.3, "tree": TREE, "window": {"strategy": "all"}}},
    "branch_mix": {"rollout": {"tree": TREE, "window": WINDOW}},
    "branch_mix_flash": {"rollout": {"tree": TREE, "window": WINDOW, "tail": {"compress": 0.4}}},
}


def write_recipe(folder, name, pipeline, algorithm, **model):
    """A recipe of 3 iterations, 2 prompts and 4 samples of a tiny pipeline."""
    changes = ALGORITHMS[algorithm]
    content = {
        "model": {**MODELS[name], "path": str(pipeline), "dtype": "fp32", "gradient_checkpointing": False, **model},
        "data": {
            "prompts": str(FAMILIES[name].write_prompts(folder / "train", TRAIN_PROMPTS)),
            "eval_prompts": str(FAMILIES[name].write_prompts(folder / "eval", TRAIN_PROMPTS[:2])),
            "prompts_per_iteration": 2,
            "embedding_cache": str(folder / "embeddings"),
        },
        "rollout": {"steps": 5, "shift": 3.0, "group_size": 4, **changes["rollout"]},
        "reward": [{"name": "jpeg_size"}],
        "update": {"lr": 1e-3, "clip_range": 1e-3, "updates_per_iteration": 2, **changes.get("update", {})},
        "engine": {"device": "cpu"},
        "run": {"iterations": 3, "checkpoint_every": 0, "eval_every": 0, "log": ["jsonl"]},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
