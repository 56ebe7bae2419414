"""The registry of model families: the name that `model.adapter` gives is that of a module here, whose FAMILY is the
record. Nothing else in the engine tells families apart. A module is imported when its record is asked for.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from flowgrove.errors import UserError
from flowgrove.models.folders import ARCHITECTURES, model_folder
from flowgrove.models.geometry import Geometry
from flowgrove.recipe.schema import AdapterName, Model, Recipe


def family_names() -> tuple[str, ...]:
    """The families that there are, in the order in which errors list them."""
    return get_args(AdapterName)


def family_of(name: str) -> Any:
    """The record of a family: its class of `models.adapter.Adapter`."""
    return import_module(f"flowgrove.models.families.{name}").FAMILY


def read_geometry(folder: Path, model: Model) -> Geometry:
    """Raises UserError for a size that the model cannot draw,
    or a folder whose configuration is not that of a `model.adapter` pipeline.
    """
    family = family_of(model.adapter)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if not family.takes(index):
            fitting = [name for name in family_names() if family_of(name).takes(index)]
            hint = f"write model.adapter: {fitting[0]}" if fitting else f"the adapters are {', '.join(family_names())}"
            raise UserError(
                f"model.path {model.path} holds a {index['_class_name']}, "
                f"which is not for model.adapter {model.adapter}: {hint}"
            )
        family.check_guidance(folder, "model.guidance_scale", model.guidance_scale)
        found: Geometry = family.read_geometry(folder, model)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"model.path {model.path}: cannot read {error.filename} ({error.strerror}): "
            "download the whole pipeline folder"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"model.path {model.path} is not laid out as a {model.adapter} pipeline: check model.adapter, "
            "or download the folder anew"
        ) from None
    boundary_of(folder, model)
    if found.frames is None and model.frames is not None:
        raise UserError(f"model.frames is {model.frames}, but {model.adapter} draws pictures: leave it out")
    return found


def boundary_of(folder: Path, model: Model) -> float | None:
    """The least σ of the expert of high noise, None: the pipeline has one transformer. Raises UserError for keys of two
    where there is one.
    """
    found: float | None = family_of(model.adapter).boundary(folder)
    keys = {"trained_experts": model.trained_experts != "both", "guidance_scale_2": model.guidance_scale_2 is not None}
    if found is None and (given := [key for key, there in keys.items() if there]):
        raise UserError(
            f"model.{given[0]} is for models with two experts, and {model.path} has one transformer: leave it out"
        )
    return found


def check_split_lengths(recipe: Recipe) -> None:
    """Raises UserError for engine.split_lengths with a family that has no mask to leave out."""
    family, name = family_of(recipe.model.adapter), recipe.model.adapter
    if recipe.engine.split_lengths and not family.splits_texts():
        why = "attends to padding, too" if family.masks_prompts else "reads every text at one length"
        raise UserError(f"engine.split_lengths is true, but the {name} transformer {why}: write false")


def configuration_folder(model: Model) -> Path:
    """`model_folder` where configuration files are enough: models that published recipes train need not be downloaded
    for it. Raises UserError.
    """
    try:
        return model_folder(model)
    except UserError:
        for name in family_names():
            if model.path in family_of(name).published:
                return ARCHITECTURES / str(family_of(name).published[model.path])
        raise
