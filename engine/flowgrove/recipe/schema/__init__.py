"""What a recipe may say: its sections, their keys and defaults.

The text below a key is its documentation: `flowgrove recipe` prints it and `make docs` writes it to docs/recipe.md. Its
first line says what the key does, its last one where that comes from; a section needs no source of its own.
"""

from typing import Annotated

from pydantic import Field

from flowgrove.recipe.schema.credit import Credit, Prune, Reward
from flowgrove.recipe.schema.data import Data
from flowgrove.recipe.schema.engine import Engine
from flowgrove.recipe.schema.model import AdapterName, Checkpointing, Expert, InitLora, Lora, Model
from flowgrove.recipe.schema.rollout import Cache, Rollout, Tail, Tree, Window
from flowgrove.recipe.schema.run import Evaluation, Run, Tracking
from flowgrove.recipe.schema.update import Update
from flowgrove.recipe.schema.values import LARGEST, Count, Index, Section

__all__ = [
    "LARGEST",
    "AdapterName",
    "Cache",
    "Checkpointing",
    "Count",
    "Credit",
    "Data",
    "Engine",
    "Evaluation",
    "Expert",
    "Index",
    "InitLora",
    "Lora",
    "Model",
    "Prune",
    "Recipe",
    "Reward",
    "Rollout",
    "Run",
    "Section",
    "Tail",
    "Tracking",
    "Tree",
    "Update",
    "Window",
]


class Recipe(Section):
    """One run."""

    model: Model
    """The pipeline, what of it trains, in which precision, and the size of its samples."""

    data: Data
    """The prompts, and how many an iteration takes."""

    rollout: Rollout = Rollout()
    """How training samples are drawn: schedule, noise, groups, and which steps are stochastic and train."""

    reward: Annotated[list[Reward], Field(min_length=1)]
    """The rewards, a list of {name, weight, options}; --set reads reward.0.weight and the like."""

    credit: Credit = Credit()
    """How rewards become advantages of edges."""

    update: Update = Update()
    """The loss, the optimiser, and how an iteration's edges are divided into updates."""

    engine: Engine = Engine()
    """How it is computed: speed and memory, not what is learnt."""

    run: Run = Run()
    """Length, seed, folder, checkpoints and evaluation."""

    @property
    def largest_guidance(self) -> float:
        """The larger guidance scale of training and evaluation."""
        return max(self.model.guidance_scale, self.run.eval.guidance_scale or 0.0)

    @property
    def uses_reference(self) -> bool:
        """Whether anything is compared with the model as it was before training, or drawn with it."""
        return self.update.kl_weight > 0 or self.run.eval.tuned_share < 1

    @property
    def halves_apart(self) -> bool:
        """Whether both halves of guidance run in forwards of their own, since only the conditional one has a gradient.
        Not where the forwards of a pass are counted: by ranks that have divided the weights, and by rollout.cache.
        """
        divided = self.engine.distributed == "fsdp2"
        return self.update.detach_unconditional and not divided and self.rollout.cache is None

    def at_sizes(self) -> list["Recipe"]:
        """This recipe once for each of model.sizes, with that height and width; without sizes, itself."""
        sizes = self.model.sizes
        if sizes is None:
            return [self]
        return [
            self.model_copy(update={"model": self.model.model_copy(update={"height": height, "width": width})})
            for height, width in sizes
        ]
