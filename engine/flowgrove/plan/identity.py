"""What a measurement of a model's passes holds for: its architecture, its size, its dtype and the settings that it ran
with. No tensors, no model.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from flowgrove.models.experts import transformer_folders
from flowgrove.models.families import configuration_folder
from flowgrove.plan.optimizer_step import OptimizerStep
from flowgrove.recipe.schema import Recipe, Rollout


@dataclass(frozen=True)
class Identity:
    """`architecture`: a hash of the transformer's and the VAE's configuration and of what trains; `size`: of pictures
    and prompts, and whether guidance doubles rows; `settings`: engine.attention, compile, cuda_graphs and
    split_lengths, and model.gradient_checkpointing; `step`: what an update's time depends on besides the architecture.
    """

    name: str
    architecture: str
    size: str
    dtype: str
    settings: dict[str, str]
    step: OptimizerStep

    @property
    def key(self) -> str:
        """Names all of it."""
        return _hash([self.architecture, self.size, self.dtype, self.settings, self.step.name])

    @classmethod
    def of(cls, recipe: Recipe) -> "Identity":
        """That of a recipe's model at the recipe's height and width. Raises UserError without configuration files."""
        model, engine, folder = recipe.model, recipe.engine, configuration_folder(recipe.model)
        parts = transformer_folders(folder)
        configs = [json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in (*parts, "vae")]
        experts = [model.trained_experts] if len(parts) > 1 else []
        size = [model.height, model.width, model.frames, model.text_tokens, model.guidance_scale > 1]
        size += [] if model.source_pictures is None else [model.source_pictures]
        pixels = f" {model.height}×{model.width}" if model.height and model.width else ""
        return cls(
            name=f"{model.path}{pixels} {model.dtype}",
            architecture=_hash([model.adapter, configs, model.lora and model.lora.model_dump(mode="json"), *experts]),
            size=_hash(size),
            dtype=model.dtype,
            settings={
                "attention": "sdpa" if engine.attention == "auto" else engine.attention,
                "compile": str(engine.compile),
                "cuda_graphs": str(engine.cuda_graphs),
                "gradient_checkpointing": model.gradient_checkpointing,
                **({} if model.base_precision is None else {"base_precision": model.base_precision}),
                **({"split_lengths": "True"} if engine.split_lengths else {}),
            },
            step=OptimizerStep.of(recipe),
        )


def cheap_forward(rollout: Rollout) -> str | None:
    """Names forwards of steps that do not train; None where they run as all others do."""
    parts = [f"in {rollout.precision}"] * (rollout.precision is not None)
    parts += [f"with {rollout.attention} attention"] * (rollout.attention is not None)
    return " ".join(["forward", *parts]) if parts else None


def score_key(recipe: Recipe, pixels: int) -> str:
    """Names what scoring a sample takes: the rewards with their options, and the sample's pixels."""
    return _hash([[reward.model_dump(mode="json", exclude={"label", "weight"}) for reward in recipe.reward], pixels])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
