"""What a recipe says that is valid by itself and can mean nothing in its place.

For recipes from files; the planner itself takes any of these.
"""

from typing import NamedTuple

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Checkpointing, Engine, Prune, Recipe
from flowgrove.recipe.windows import pruned_depths, window_steps

_LOOKED_AT = 1000  # iterations


def check_meaning(recipe: Recipe) -> None:
    """Raises UserError naming the key, with what to write instead."""
    rollout, prune = recipe.rollout, recipe.credit.prune
    if rollout.guidance_range is not None:
        low, high = rollout.guidance_range
        if not low < high <= rollout.steps:
            wanted = f"write 0 <= lo < hi <= rollout.steps = {rollout.steps}, or null for all steps"
            raise UserError(f"rollout.guidance_range is [{low}, {high}): {wanted}")
    if rollout.group_size == 1 and recipe.update.kl_weight == 0:
        reason = "advantages are differences within a group, so nothing would be trained"
        raise UserError(f"rollout.group_size is 1: {reason}; write 2 or more")
    if recipe.run.gradient_noise_every is not None and recipe.data.prompts_per_iteration == 1:
        raise UserError(
            "run.gradient_noise_every compares the gradients of prompts, and data.prompts_per_iteration is 1: write 2 "
            "or more, or null"
        )
    initial = recipe.model.init_lora
    if initial is not None and not initial.merge and recipe.model.lora is None:
        raise UserError(
            f"model.init_lora.merge is false, so that {initial.path} would be trained on, but model.lora is null: "
            "write model.init_lora.merge: true, or a model.lora"
        )
    _check_base_precision(recipe)
    of_low = recipe.model.guidance_scale_2
    if of_low is not None and (of_low > 1) != (recipe.model.guidance_scale > 1):
        raise UserError(
            f"model.guidance_scale_2 is {of_low:g} and model.guidance_scale {recipe.model.guidance_scale:g}: write "
            "both above 1, or neither, as a row has an unconditional one in all steps or in none"
        )
    _check_open_splits(recipe)
    if prune is not None and prune.kind == "depth":
        _check_depths(recipe, prune)
    _check_sharding(recipe)
    _check_split_lengths(recipe)
    if recipe.model.gradient_checkpointing not in ("auto", "offload", *checkpointing_with(recipe.engine)):
        mode = "true" if recipe.engine.compile is True else recipe.engine.compile
        raise UserError(
            f"model.gradient_checkpointing: selective does not go with engine.compile: {mode} and "
            "engine.distributed: fsdp2, whose gathering no compiled checkpoint takes in: write full or none"
        )
    _refuse_beside(
        "model.gradient_checkpointing: offload", "full",
        _Beside(
            "engine.reuse_rollout_graph: true",
            recipe.model.gradient_checkpointing == "offload" and recipe.engine.reuse_rollout_graph is True, "auto",
            "host memory would hold the graphs of a whole rollout",
        ),
    )  # fmt: skip
    _refuse_beside(
        "model.dtype: fp64", "another dtype",
        _Beside(
            f"rollout.precision: {rollout.precision}",
            rollout.precision is not None and recipe.model.dtype == "fp64", "null", "it computes everything in float64",
        ),
    )  # fmt: skip


def shards_of(engine: Engine, ranks: int) -> int:
    """Among how many of so many ranks engine.shard_degree divides the weights. Raises UserError for no divisor."""
    shards = engine.shard_degree or ranks
    if ranks % shards:
        raise UserError(
            f"engine.shard_degree is {shards}, which does not divide {ranks} ranks: write a divisor, or null"
        )
    return shards


def checkpointing_with(engine: Engine) -> tuple[Checkpointing, ...]:
    """The values of model.gradient_checkpointing that go with an engine and are weighed, the slowest first."""
    hides = engine.compile and engine.distributed == "fsdp2"
    return ("full", "none") if hides else ("full", "selective", "none")


class _Beside(NamedTuple):
    """A key that is set beside another that it does not go with."""

    key: str
    set_: bool
    instead: str
    why: str = ""


def _refuse_beside(key: str, without: str, *others: _Beside) -> None:
    """Raises UserError for the first of `others` that is set. `without`: what to write in place of `key`."""
    for other in others:
        if other.set_:
            what = f"{other.key} does not go with {key}{other.why and f' ({other.why})'}"
            raise UserError(f"{what}: write {other.instead}, or {without}")


def _check_base_precision(recipe: Recipe) -> None:
    model = recipe.model
    if model.base_precision is None:
        return
    key = f"model.base_precision: {model.base_precision}"
    if model.lora is None:
        raise UserError(f"{key} rounds frozen weights, and with model.lora: null all of them train: write a model.lora")
    _refuse_beside(
        key, "model.base_precision: null",
        _Beside("model.dtype: fp64", model.dtype == "fp64", "fp32 or bf16"),
        _Beside("engine.distributed: fsdp2", recipe.engine.distributed == "fsdp2", "ddp"),
        _Beside(f"rollout.precision: {recipe.rollout.precision}", recipe.rollout.precision is not None, "null"),
    )  # fmt: skip


def _check_sharding(recipe: Recipe) -> None:
    engine, rollout, optimizer = recipe.engine, recipe.rollout, recipe.update.optimizer
    if engine.distributed != "fsdp2":
        if engine.shard_degree is not None:
            raise UserError(
                f"engine.shard_degree divides weights, but engine.distributed is {engine.distributed}: "
                "write fsdp2, or remove it"
            )
        return
    _refuse_beside(
        "engine.distributed: fsdp2", "ddp",
        _Beside("engine.cuda_graphs: true", engine.cuda_graphs, "false"),
        _Beside("engine.reuse_rollout_graph: true", engine.reuse_rollout_graph is True, "auto"),
        _Beside(f"rollout.precision: {rollout.precision}", rollout.precision is not None, "null"),
        _Beside(f"rollout.attention: {rollout.attention}", rollout.attention is not None, "null"),
        _Beside(f"update.optimizer: {optimizer}", optimizer != "adamw", "adamw"),
    )  # fmt: skip


def _check_split_lengths(recipe: Recipe) -> None:
    if not recipe.engine.split_lengths:
        return
    cached, divided = recipe.rollout.cache is not None, recipe.engine.distributed == "fsdp2"
    together = "ranks that divide weights run forwards together, each as many as the others"
    _refuse_beside(
        "engine.split_lengths: true", "engine.split_lengths: false",
        _Beside("engine.cuda_graphs: true", recipe.engine.cuda_graphs, "false", "each length would be a recording"),
        _Beside("rollout.cache", cached, "null", "a cache follows whole passes from step to step"),
        _Beside("engine.distributed: fsdp2", divided, "ddp", together),
    )  # fmt: skip


def _check_open_splits(recipe: Recipe) -> None:
    """What a split explains is known only where nothing but splits is random, and nothing names steps beforehand."""
    tree, window, prune = recipe.rollout.tree, recipe.rollout.window, recipe.credit.prune
    if tree is None or tree.splits != "auto":
        return
    if window.strategy != "none":
        raise UserError(
            "rollout.tree.splits: auto measures the noise of splits, and that of the window would be taken for theirs: "
            "write rollout.window.strategy: none, or the splits"
        )
    if prune is not None and prune.kind == "depth":
        raise UserError(
            "rollout.tree.splits: auto does not go with credit.prune.kind: depth, which would keep chosen splits from "
            "training: write credit.prune: null, or the splits"
        )


def _check_depths(recipe: Recipe, prune: Prune) -> None:
    steps, tree = recipe.rollout.steps, recipe.rollout.tree
    if max(prune.first, prune.stop) >= steps:
        key = "first" if prune.first >= steps else "stop"
        found = f"credit.prune.{key} is {getattr(prune, key)}"
        raise UserError(f"{found}: the steps are 0 to {steps - 1} (rollout.steps); write {steps - 1} or less")
    splits = set(tree.splits if tree and tree.splits != "auto" else ())
    for iteration in range(min(recipe.run.iterations, _LOOKED_AT)):
        stochastic = splits.union(window_steps(recipe.rollout.window, steps, iteration, recipe.run.seed))
        if not stochastic or not stochastic <= set(pruned_depths(prune, iteration)):
            return  # without a stochastic step there is another reason that nothing trains
    wanted = f"write fewer depths than {prune.depths}, or another first than {prune.first}"
    raise UserError(f"credit.prune prunes every step that would train: {wanted}")
