"""The keys of a recipe as documentation: what each may be, its default, and the text that stands below it in schema/.

pydantic would read these texts too (use_attribute_docstrings), whenever the schema is imported; here only the command
that shows them waits for it.
"""

import ast
import difflib
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowgrove.errors import UserError
from flowgrove.recipe import schema

_NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true | false", NoneType: "null"}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


class Key(NamedTuple):
    """A key of a recipe: its dotted name, what it may be, its default as YAML ("required" without one, "" for a section
    that is always there), its documentation in three parts, and whether it holds keys of its own.
    """

    name: str
    values: str
    default: str
    summary: str
    details: str
    source: str
    section: bool


@cache
def recipe_keys() -> tuple[Key, ...]:
    """All keys in the order of the schema, a section before its own. What several keys hold is told at the first."""
    return tuple(_keys(schema.Recipe, "", set()))


def find_key(name: str) -> tuple[Key, list[Key]]:
    """The key of that dotted name (entries of lists by number or without) and the keys right below it.
    Raises UserError naming the nearest key.
    """
    wanted = ".".join(part for part in name.strip().split(".") if not part.isdecimal())
    keys = {key.name: key for key in recipe_keys()}
    if wanted not in keys:
        raise UserError(f"unknown key {name}: {_hint(wanted, list(keys))}")
    return keys[wanted], [key for key in keys.values() if key.name.rpartition(".")[0] == wanted]


def _hint(wanted: str, names: list[str]) -> str:
    """The nearest of `names`: the whole name, or the same last part in another section."""
    last = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.7) or [
        last[found] for found in difflib.get_close_matches(wanted.rpartition(".")[2], last, n=1, cutoff=0.5)
    ]
    return f"did you mean {near[0]}?" if near else f"sections: {', '.join(n for n in names if '.' not in n)}"


def _keys(section: type[BaseModel], prefix: str, told: set[type[BaseModel]]) -> Iterator[Key]:
    texts, types = _texts(section), get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        below = _section_in(types[name])
        below = None if below in told else below
        text, _, source = texts.get(name, "").partition("\nSource: ")  # a test holds that nothing is missing
        summary, _, details = text.partition("\n")
        summary, details, source = (" ".join(part.split()) for part in (summary, details, source))
        kind, default = _values(types[name]), _default(field)
        yield Key(f"{prefix}{name}", kind, default, summary, details, source, below is not None)
        if below is not None:
            told.add(below)
            yield from _keys(below, f"{prefix}{name}.", told)


def _texts(section: type[BaseModel]) -> dict[str, str]:
    """Key → the text below it, as it stands in the section's source."""
    (node,) = ast.parse(inspect.getsource(section)).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    return {
        key.target.id: inspect.cleandoc(below.value.value)
        for key, below in pairwise(body)
        if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def _section_in(kind: Any) -> type[BaseModel] | None:
    """The section that a type holds, by itself, or null, or in a list."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for one in get_args(kind) if (found := _section_in(one)) is not None), None)


def _values(kind: Any, limits: str = "") -> str:
    """What a type takes, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _values(inner[0], _limits(kind.__metadata__))
    if origin in (Union, UnionType, Literal):
        return " | ".join(str(one) if origin is Literal else _values(one) for one in inner)
    if origin is list:
        return f"list of {_values(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(_values(one) for one in inner)}]"
    if (section := _section_in(kind)) is not None:
        return f"{{{', '.join(section.model_fields)}{', ...' if section.model_config.get('extra') == 'allow' else ''}}}"
    return f"{_NAMES[kind]}{limits}"


def _limits(metadata: tuple[Any, ...]) -> str:
    """The limits of a number, as far as they are more than a guard against mistakes."""
    found = {
        kind: as_yaml(limit)
        for part in metadata
        if isinstance(part, FieldInfo)
        for one in part.metadata
        for kind in _SIGNS
        if (limit := getattr(one, kind, None)) is not None and abs(limit) < schema.LARGEST
    }
    if set(found) == {"ge", "le"}:
        return f" from {found['ge']} to {found['le']}"
    return "".join(
        f"{' and' if number else ''} {_SIGNS[kind]} {limit}" for number, (kind, limit) in enumerate(found.items())
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if isinstance(field.default, BaseModel) else as_yaml(field.default)


def as_yaml(value: Any) -> str:
    """A default as a recipe would say it, on one line."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return repr(value).replace("e-0", "e-") if isinstance(value, float) else str(value)
