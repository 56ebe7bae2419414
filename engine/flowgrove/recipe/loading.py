"""Recipes from files and mappings, validated and checked, and back to YAML.
A mistake is one line that names its key.
"""

import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from flowgrove.errors import UserError
from flowgrove.recipe.checks import check_meaning
from flowgrove.recipe.files import read_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.recipe.yaml_files import write_yaml


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in `path`, with `extends:` followed, `key=value` overrides applied, paths found and run.out named.
    Raises UserError.
    """
    recipe = parse_recipe(read_recipe(path, overrides))
    check_meaning(recipe)
    return recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"out": recipe.run.out.replace("NAME", path.stem)})}
    )


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """Validates a mapping. Raises UserError with the first mistake: its key, what is wrong, what to write."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(error)) from None
    model = recipe.model
    if model.sizes is None:
        return recipe
    height, width = model.sizes[0]  # evaluation draws at the first size, unless another is given
    return recipe.model_copy(
        update={"model": model.model_copy(update={"height": model.height or height, "width": model.width or width})}
    )


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every key written out, as YAML."""
    return write_yaml(recipe.model_dump(mode="json"))


def _explain(error: ValidationError) -> str:
    """The first mistake in one line; a misspelt key comes before the missing one that it was meant to be."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    first, place = errors[0], _place(errors[0]["loc"])
    key = ".".join(place) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _keys_at(place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if first["type"] == "missing" and not place[-1].isdigit():
        return f"{key} is missing: every recipe needs it"
    # of a union, what each member asks for
    messages = [e["msg"].removeprefix("Value error, ") for e in errors if _place(e["loc"]) == place]
    shown = repr(first["input"])
    wanted = " or ".join(message[0].lower() + message[1:] for message in messages)
    return f"{key} is {shown if len(shown) < 80 else shown[:77] + '...'}: {wanted}"


def _place(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the user wrote, without the union members and validators that pydantic adds."""
    added = ("function-", "tuple[", "literal[", "list[", "constrained-")
    return [
        str(part)
        for part in location
        if not (isinstance(part, str) and (part.startswith(added) or part in ("int", "float")))
    ]


def _keys_at(place: list[str]) -> list[str]:
    model: Any = Recipe
    for part in place:
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
    return list(model.model_fields) if model else []
