"""What a run derives from its recipe before the first iteration: each thing once, for all that need it."""

import hashlib
import json
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.planner import RolloutPlan, check_trained_experts, make_plan
from flowgrove.plan.sigmas import SigmaTable, recipe_sigmas
from flowgrove.plan.split_search import Splits, SplitSearch
from flowgrove.recipe.deciding import deciding
from flowgrove.recipe.schema import Recipe, Rollout, Window

if TYPE_CHECKING:  # predicting memory needs torch, planning does not
    from flowgrove.data.columns import Columns
    from flowgrove.plan.memory import MemoryModel


class Setup:
    """The set-up of one recipe: made at the start and handed down. Everything is derived when it is first asked for,
    and stays. Raises UserError then: for files that cannot be read, and plans that cannot be made.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._memory: dict[tuple[str, Division], MemoryModel] = {}

    def trained_to(self, iterations: int) -> "Setup":
        """The set-up of the same recipe with another run.iterations."""
        run = self.recipe.run.model_copy(update={"iterations": iterations})
        return Setup(self.recipe.model_copy(update={"run": run}))

    def computing_again(self, kind: str) -> "Setup":
        """This set-up, with what it has derived, of the recipe with another model.gradient_checkpointing."""
        other = copy(self)
        model = self.recipe.model.model_copy(update={"gradient_checkpointing": kind})
        other.recipe, other._memory = self.recipe.model_copy(update={"model": model}), {}
        vars(other).pop("sizes", None)
        return other

    @cached_property
    def prompts(self) -> list[str]:
        """The training prompts: what is trained on and what the fingerprint is of, whatever their file holds later."""
        return self.read_prompts(self.recipe.data.prompts, "data.prompts", self.recipe.data.prompt_key)

    @cached_property
    def eval_prompts(self) -> list[str]:
        """The held-out prompts; none without data.eval_prompts."""
        file = self.recipe.data.eval_prompts
        return self.read_prompts(file, "data.eval_prompts", self.recipe.data.prompt_key) if file else []

    def read_prompts(self, file: str | Path, key: str, column: str | None = None) -> list[str]:
        """The prompts of a file, with what the recipe's model and rewards need of their rows. Raises UserError."""
        from flowgrove.data.prompts import read_prompts  # a plan is made without its readers

        return read_prompts(file, key, column, self.columns)

    @cached_property
    def columns(self) -> "Columns":
        """What is read of the prompts' rows beside their text."""
        from flowgrove.data.columns import Columns
        from flowgrove.models.families import configuration_folder, family_of, read_geometry

        model, metadata = self.recipe.model, self.recipe.data.metadata
        family, frames = family_of(model.adapter), 0
        if family.source_video:
            frames = read_geometry(configuration_folder(model), model).frames or 0
        return Columns(family.source_count(model) > 0, frames, metadata if metadata == "all" else tuple(metadata or ()))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides the weights: all but the run's length, folder, logging and evaluation, and with the
        prompts' text and the content of model.init_lora for their paths.

        Keys at their default do not enter, so that a version with new keys resumes old runs.
        """
        return self._hash(self._deciding)

    @cached_property
    def _deciding(self) -> dict[str, Any]:
        content = deciding(self.recipe, exclude_defaults=True)
        from flowgrove.data.prompt import described

        content["data"] |= {"prompts": [described(prompt) for prompt in self.prompts], "eval_prompts": None}
        if self.initial_lora is not None:
            content["model"]["init_lora"]["path"] = self.initial_lora
        return content

    @cached_property
    def initial_lora(self) -> str | None:
        """The SHA-256 of what model.init_lora holds; None without it."""
        if self.recipe.model.init_lora is None:
            return None
        from flowgrove.models.folders import lora_digest
        from flowgrove.models.initial_lora import initial_files

        return lora_digest(initial_files(self.recipe.model).values())

    @staticmethod
    def _hash(content: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def is_of(self, fingerprint: str) -> bool:
        """Whether a run with this fingerprint is of this recipe. Of an engine section that decides nothing one may have
        been written there and not here, or the other way round.
        """
        if self._deciding.get("engine"):
            return fingerprint == self.fingerprint
        without = {name: section for name, section in self._deciding.items() if name != "engine"}
        return fingerprint in (self._hash(without), self._hash({**without, "engine": {}}))

    @cached_property
    def sizes(self) -> list["Setup"]:
        """This set-up at each of model.sizes; without sizes, itself."""
        return [self] if self.recipe.model.sizes is None else [Setup(sized) for sized in self.recipe.at_sizes()]

    @cached_property
    def table(self) -> SigmaTable:
        """The σ table, at the recipe's height and width."""
        return recipe_sigmas(self.recipe)

    @cached_property
    def first_plan(self) -> RolloutPlan:
        """The plan of iteration 0, whose counts stand for the run; where splits will be chosen, one whose tree takes
        their budget.
        """
        check_trained_experts(self.recipe, self.table)
        return make_plan(self.recipe, 0, self.table, None if self.split_search is None else self.split_search.dear)

    @cached_property
    def split_search(self) -> SplitSearch | None:
        """Which splits the tree may have, where rollout.tree.splits is auto."""
        return SplitSearch.of(self.recipe)

    def plan(self, iteration: int, chosen: Splits | None = None) -> RolloutPlan:
        """The plan of an iteration (0-based). `chosen`: the splits that the run has chosen; while they are not known, a
        tree that takes their budget stands in.
        """
        if iteration == 0 and self.split_search is None:
            return self.first_plan
        splits = None if self.split_search is None else self.split_search.splits(iteration, chosen)
        return make_plan(self.recipe, iteration, self.table, splits)

    @cached_property
    def eval_plan(self) -> RolloutPlan:
        """The plan of evaluation and sampling: the plain ODE, run.eval.samples pictures of each prompt."""
        recipe, settings = self.recipe, self.recipe.run.eval
        plain = Rollout(
            steps=settings.steps or recipe.rollout.steps,
            shift=recipe.rollout.shift,
            group_size=settings.samples,
            shared_initial_noise=False,
            window=Window(strategy="none"),
        )
        one = {"updates_per_iteration": 1, "edges_per_update": None, "step_fraction": 1.0}
        update = recipe.update.model_copy(update=one)
        credit = recipe.credit.model_copy(update={"prune": None})
        recipe = recipe.model_copy(update={"rollout": plain, "update": update, "credit": credit})
        return make_plan(recipe, 0, recipe_sigmas(recipe))

    def memory(self, device_type: str, division: Division = ALONE) -> "MemoryModel":
        """What predicts the memory of an iteration on a cpu or a cuda device, of one rank of so many."""
        from flowgrove.plan.memory import MemoryModel

        key = device_type, division
        if key not in self._memory:
            self._memory[key] = MemoryModel(self.recipe, self.first_plan, device_type, division)
        return self._memory[key]
