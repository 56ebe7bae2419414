"""Which weights of a transformer train: all of them, or LoRA layers beside them (Hu et al. 2106.09685); or none any
more.
"""

from typing import Any, Self

import torch
from peft import LoraConfig

from flowgrove.errors import UserError
from flowgrove.models.experts import trained_parts
from flowgrove.models.fused_lora import fuse_lora
from flowgrove.recipe.schema import Lora, Recipe


class OnlyDraws(Recipe):
    """A recipe of whose model nothing will train: weights that passes read in bf16 need no masters, and lie in bf16."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """What `recipe` says, of a model that only draws."""
        return cls.model_construct(**dict(recipe))


def choose_trainable(transformer: Any, lora: Lora | None, default_targets: tuple[str, ...], seed: int) -> None:
    """Sets requires_grad, and adds seeded LoRA layers where the recipe asks for them.
    Raises UserError for targets that match no layer.
    """
    transformer.requires_grad_(False)
    if lora is None:
        for part in trained_parts(transformer).values():
            part.requires_grad_(True)
        return
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.targets or list(default_targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for part in trained_parts(transformer).values():
                part.add_adapter(config)
                fuse_lora(part)
        except ValueError as error:
            raise UserError(f"model.lora.targets: {' '.join(str(error).split())[:300]}") from None
