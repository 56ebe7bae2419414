"""What a recipe file says, before it is validated: YAML with `extends:` followed, `key=value` overrides applied and
paths found by the rule of paths.py.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from flowgrove.errors import UserError
from flowgrove.paths import find, local, read_bytes
from flowgrove.recipe.yaml_files import MOST_BYTES, read_yaml

_MOST_BASES = 32
_REWARD_PATHS = ("path", "processor", "clip", "tokenizer", "file")


def read_recipe(path: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """The content of the recipe in `path`, and of those that it extends. Raises UserError."""
    path = _real(local(path, "recipe"))
    content = _read_chain(path)
    for override in overrides:
        apply_override(content, override)
    for place, key, name in _paths_in(content):
        found = find(place[key], path.parent, name) or find(place[key], Path.cwd(), name)
        if found is not None:
            place[key] = found
        elif place[key].startswith("~"):
            place[key] = str(local(place[key], name))
    for section, key in (("run", "out"), ("data", "embedding_cache")):  # written, so relative to the working folder
        written: Any = content.get(section)
        if isinstance(written, dict) and isinstance(written.get(key), str):
            path = local(written[key], f"{section}.{key}")
            written[key] = str(path) if written[key].startswith("~") else written[key]
    return content


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _read_chain(path: Path) -> dict[str, Any]:
    """The file and its bases, each under what extends it; paths beside the recipe that says them are made absolute."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    base: Any = path
    while base is not None:
        if any(base == seen for seen, _ in chain):
            names = " -> ".join(seen.name for seen in (*(seen for seen, _ in chain), base))
            raise UserError(f"{base}: `extends` goes round in a circle: {names}")
        if len(chain) == _MOST_BASES:
            raise UserError(f"{path} extends a chain of more than {_MOST_BASES} recipes: join some of them")
        content = _read(base)
        chain.append((base, content))
        for place, key, name in _paths_in(content):
            place[key] = find(place[key], base.parent, name) or place[key]
        said = content.pop("extends", None)
        if said is not None and not isinstance(said, str):
            raise UserError(f"{base}: extends is {said!r}: write the path of one recipe")
        base = None if said is None else _real(base.parent / local(said, f"{base}: extends"))
    merged: dict[str, Any] = {}
    for _, content in reversed(chain):
        merged = _merge(merged, content)
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(read_bytes(path, MOST_BYTES, "the recipe").decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save the recipe as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a recipe: write a mapping with model, data and reward")
    return content


def _paths_in(content: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """Where a recipe names what is there to be read: the mapping, the key in it, and the key's name in errors.

    `tiny` is a model, not a path.
    """
    places: list[tuple[Any, tuple[str, ...], str]] = [
        (content.get("data"), ("prompts", "eval_prompts"), "data"),
        (content.get("model"), ("path",), "model"),
    ]
    places.append((_at(content, "model", "init_lora"), ("path",), "model.init_lora"))
    for name, rewards in (
        ("reward", content.get("reward")),
        ("run.eval.rewards", _at(content, "run", "eval", "rewards")),
    ):
        entries = rewards if isinstance(rewards, list) else []
        places += [(reward, _REWARD_PATHS, f"{name}.{index}") for index, reward in enumerate(entries)]
    return [
        (place, key, f"{name}.{key}")
        for place, keys, name in places
        if isinstance(place, dict)
        for key in keys
        if isinstance(place.get(key), str) and place[key] and (name, place[key]) != ("model", "tiny")
    ]


def _at(content: Any, *keys: str) -> Any:
    """What lies there; None: there are no such sections."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _merge(base: Any, change: Any) -> Any:
    if isinstance(base, dict) and isinstance(change, dict):
        return {**base, **{key: _merge(base.get(key), value) for key, value in change.items()}}
    return change


def apply_override(content: dict[str, Any], override: str) -> None:
    """Sets one key; a number stands for an entry of a list, counted from 0."""
    key, equals, value = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all((*sections, last)):
        raise UserError(f"--set {override}: write --set section.key=value, like --set run.seed=3")
    try:
        given = read_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: {value!r} is not YAML: {error}") from None
    place: Any = content
    for depth, section in enumerate(sections):
        found = place[_entry(place, section, override)] if isinstance(place, list) else place.get(section)
        if isinstance(found, list) and not sections[depth + 1 :] and not last.isdecimal():
            name = ".".join(sections)
            raise UserError(f"--set {override}: {name} is a list: write --set {name}.0.{last}=... for its first entry")
        if not isinstance(found, dict | list):
            found = {}
            place[_entry(place, section, override) if isinstance(place, list) else section] = found
        place = found
    place[_entry(place, last, override) if isinstance(place, list) else last] = given


def _entry(entries: list[Any], section: str, override: str) -> int:
    if section.isascii() and section.isdecimal() and len(section) < 9 and int(section) < len(entries):
        return int(section)
    wanted = f"write a number from 0 to {len(entries) - 1}" if entries else "write a list"
    raise UserError(f"--set {override}: {section} is no entry of a list of {len(entries)}: {wanted}")
