"""Finished runs: open their model, evaluate it, export it."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from flowgrove.device import pick_backend, pick_device
from flowgrove.errors import UserError
from flowgrove.evaluation import evaluate
from flowgrove.files import follow_umask, partial_name, write_text
from flowgrove.joining import joined
from flowgrove.models.adapter import Adapter
from flowgrove.models.experts import trained_parts
from flowgrove.models.families import family_of
from flowgrove.models.loading import check_prompts
from flowgrove.models.lora_files import FORMATS, how_to_load, layers_of, write_lora
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.models.stored import DTYPES, all_in, bf16_in
from flowgrove.process import started
from flowgrove.ranks import Ranks
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Engine, Lora, Recipe
from flowgrove.rewards.faults import Faults
from flowgrove.rewards.registry import Rewards
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.run.finding import find_checkpoint, pointed_at
from flowgrove.run.manifest import read_state, verify
from flowgrove.run.resume import check_same_lora
from flowgrove.run.tensor_files import TensorFiles, holds
from flowgrove.setup import Setup


@dataclass(frozen=True)
class Model:
    """A loaded base model, and the checkpoint that `restore` puts into it; None for a recipe's own."""

    recipe: Recipe
    policy: Policy
    checkpoint: Path | None

    def restore(self, ranks: Ranks | None = None) -> "Model":
        """The trained weights take the base model's place, on all `ranks` together."""
        if self.checkpoint is not None:
            load_checkpoint(self.checkpoint, self.policy, None, ranks)
        return self


@contextmanager
def joined_for(source: Path, overrides: tuple[str, ...] = ()) -> Iterator[Ranks]:
    """The ranks that torchrun has started for a command that draws with `source`, a run folder or a recipe.

    Such a command changes no run, so that engine.distributed need not allow it. Raises UserError.
    """
    if started() == 1:
        yield Ranks()
        return
    recipe = load_recipe(_recipe_file(source), overrides)
    with joined(Engine(distributed="ddp"), pick_device(recipe)) as ranks:  # each holds the whole model
        yield ranks


def open_recipe(
    source: Path, overrides: tuple[str, ...] = (), which: str | None = None, ranks: Ranks | None = None
) -> tuple[Recipe, Path | None]:
    """The recipe of a run folder and one of its checkpoints, as `find_checkpoint` understands `which`, or a recipe
    file's and None; with a recipe file, `which` may name a checkpoint's folder. Raises UserError.

    All `ranks` get the checkpoint that the first one finds: the run may be writing another.
    """
    ranks = ranks or Ranks()
    found = ranks.by_first(lambda: _checkpoint_of(source, which))
    chosen = ranks.chosen(None if found is None else str(found))
    recipe = ranks.together(lambda: load_recipe(_recipe_file(source), overrides))
    return recipe, None if chosen is None else Path(chosen)


def _check_run(run: Path) -> None:
    if not run.is_dir():
        raise UserError(f"{run} is not a run folder: give the folder that `flowgrove train` wrote")


def _recipe_file(source: Path) -> Path:
    return source / "recipe.yaml" if source.is_dir() else source


def _checkpoint_of(source: Path, which: str | None) -> Path | None:
    if source.is_dir():
        checkpoint = find_checkpoint(source, which)
        verify(checkpoint)  # before a model is loaded
        return checkpoint
    if which is not None and (which == "best" or not Path(which).exists()):
        raise UserError(f"--checkpoint {which}: {source} is no run folder: give one, or the path of a checkpoint")
    return None if which is None else pointed_at(Path(which))


def open_model(
    recipe: Recipe, checkpoint: Path | None, texts: Sequence[str] | None = (), ranks: Ranks | None = None
) -> Model:
    """The base model of what `open_recipe` found. `texts`: prompts that it will encode, or the other `ranks`; None:
    only its weights are wanted. Raises UserError.
    """
    if checkpoint is not None:
        check_same_lora(Setup(recipe), read_state(checkpoint), checkpoint)
    # no copy of the reference model, and none for cheaper rollouts
    without = {
        "update": recipe.update.model_copy(update={"kl_weight": 0.0}),
        "rollout": recipe.rollout.model_copy(update={"precision": None, "attention": None}),
    }
    draws, ranks = recipe.model_copy(update=without), ranks or Ranks()
    mine = (texts or ())[ranks.share(len(texts or ()))]
    ranks.together(lambda: check_prompts(recipe, mine))
    policy = Policy.load_together(draws, pick_device(recipe), texts, ranks, trains=False)
    return Model(recipe, policy, checkpoint)


def evaluate_run(
    run: Path, overrides: tuple[str, ...] = (), which: str | None = None, ranks: Ranks | None = None
) -> dict[str, dict[str, float]]:
    """Rewards of a checkpoint (None: the newest) on the held-out prompts: {name: {mean, confidence}} (half of the 95 %
    interval), and "weighted_sum". Each of the `ranks` scores its share of the prompts; all return the same. A prompt
    that cannot be scored is left out, with a warning.

    Written to eval.json in the run folder. Raises UserError for a recipe without held-out prompts.
    """
    ranks = ranks or Ranks()
    ranks.together(lambda: _check_run(run))
    recipe, checkpoint = open_recipe(run, overrides, which, ranks)
    setup = Setup(recipe)

    def scored_by() -> Rewards:
        if not setup.eval_prompts:
            raise UserError(f"{run}: its recipe has no data.eval_prompts, so there is nothing to evaluate on")
        return Rewards(recipe, pick_device(recipe)).of_evaluations

    rewards = ranks.together(scored_by)
    model = open_model(recipe, checkpoint, setup.eval_prompts, ranks)
    policy = model.restore(ranks).policy
    runner = ranks.together(lambda: PassRunner.of(recipe, policy))
    faults = Faults()
    with ranks.together(lambda: pick_backend(recipe)):
        evaluated = evaluate(setup, policy, runner, rewards, setup.eval_prompts, ranks=ranks, faults=faults)
    samples = recipe.run.eval.samples
    result = evaluated.estimates(list(rewards.scorers), rewards.weights, samples)
    if not result:
        ranks.together(faults.raise_first)
    faults.tell("the evaluation", int(evaluated.scores.isnan().any(1).sum()) // samples)
    ranks.by_first(lambda: write_text(run / "eval.json", json.dumps(result, indent=2) + "\n"))
    return result


def export_run(
    run: Path,
    out: Path,
    overrides: tuple[str, ...] = (),
    which: str | None = None,
    form: str = "diffusers",
    dtype: str | None = None,
) -> str:
    """Writes a checkpoint (None: the newest) for diffusers or ComfyUI; returns a line that says how to load it.

    A LoRA needs no base model. `dtype`: bf16, fp16 or fp32; None: as it was trained, which is fp32, but bf16 for
    weights of a whole pipeline that a run with model.dtype bf16 found in bf16.
    """
    for option, value, known in (("format", form, FORMATS), ("dtype", dtype, tuple(DTYPES))):
        if value is not None and value not in known:
            raise UserError(f"--{option} is {value}: write {', '.join(known[:-1])} or {known[-1]}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    _check_run(run)
    here = ("engine.device=cpu", "engine.backend=auto", "engine.attention=auto")
    recipe, checkpoint = open_recipe(run, (*here, *overrides), which)
    family, lora = family_of(recipe.model.adapter), recipe.model.lora
    if lora is None and form == "comfyui":
        raise UserError(f"--format comfyui is for a LoRA, and {run} trained the whole model: write --format diffusers")
    partial, told = partial_name(out), ""
    try:
        if lora is None:
            adapter = open_model(recipe, checkpoint, None).restore().policy.adapter  # the transformer alone
            adapter.save_pipeline(partial, _dtypes_of_weights(adapter, recipe, dtype))
            told = f'wrote a pipeline: {family.pipeline_name(partial)}.from_pretrained("{out}")'
        elif checkpoint is not None:
            layers = _lora_layers(checkpoint, lora)
            write_lora(partial, form, layers, lora, family, DTYPES.get(dtype or ""))
            told = how_to_load(out, form, layers, family)
        follow_umask(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}; free some space and give the same command again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    initial = recipe.model.init_lora
    if lora is not None and initial is not None and initial.merge:
        below = f" on top of {initial.path} at {initial.strength:g}, which the run has merged"
    else:
        below = ""
    return told.replace(": ", f"{below}: ", 1)


def _dtypes_of_weights(adapter: Adapter, recipe: Recipe, dtype: str | None) -> dict[str, torch.dtype]:
    if dtype is not None:
        return all_in(adapter.transformer, DTYPES[dtype])
    if recipe.model.dtype != "bf16" or adapter.folder is None:
        return {}
    found: dict[str, torch.dtype] = {}
    for start in trained_parts(adapter.transformer):
        kinds = bf16_in(adapter.folder / (start.rstrip(".") or "transformer"))
        found |= {f"{start}{name}": kind for name, kind in kinds.items()}
    return found


def _lora_layers(checkpoint: Path, lora: Lora) -> dict[str, torch.Tensor]:
    """The trained layers of a checkpoint, averaged if it has averages, without a model. Raises UserError."""
    verify(checkpoint)
    tensors = TensorFiles(checkpoint, "ema" if holds(checkpoint, "ema") else "weights").read()
    try:
        return layers_of(tensors, lora)
    except ValueError as error:
        what = f"{checkpoint} holds other weights than its recipe.yaml trains ({error})"
        raise UserError(f"{what}: give the run's own folder") from None
