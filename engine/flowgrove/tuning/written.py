"""The recipe that `flowgrove tune` writes: what extends the measured one, with the measurements as comments."""

import textwrap
from typing import Any

import torch

from flowgrove.machine import describe
from flowgrove.recipe.schema import Recipe
from flowgrove.recipe.yaml_files import write_yaml
from flowgrove.tuning.choosing import Choice
from flowgrove.tuning.pass_times import NEAR, Work


def given_keys(recipe: Recipe, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What `overrides` have set, each value as the whole recipe has it: sections in full, files found."""
    given: dict[str, Any] = {}
    for override in overrides:
        place, value = given, recipe.model_dump(mode="json")
        *sections, last = override.partition("=")[0].strip().split(".")
        for section in sections:
            if isinstance(value[section], list):  # whole, whichever entry was set
                last = section
                break
            place, value = place.setdefault(section, {}), value[section]
        place[last] = value[last]
    return given


def header(device: torch.device, work: Work) -> list[str]:
    """What was measured where, in lines of a comment."""
    machine = describe(device)
    place = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}"
    passes = f"{work.forwards} forwards and {work.passes} training passes"
    return [
        f"`flowgrove tune` on {place}: ms per row of a rollout's",
        f"pass + of a training pass (forward and backward), and the seconds that the {passes} of iteration 0",
        f"should take. Of settings within {NEAR:.0%} of the fastest the first is taken.",
    ]


def written(content: dict[str, Any], fixed: dict[str, Any], choices: list[Choice], header: list[str]) -> str:
    """YAML of `content` and engine's `fixed` keys and choices, with the measurements as comments, below a header."""
    engine = [f"{write_yaml(fixed)}"] if fixed else []
    for choice in choices:
        if choice.section == "engine":
            engine.append("".join(f"# {line}\n" for line in choice.lines) + write_yaml({choice.key: choice.value}))
        else:
            name = f"{choice.section}.{choice.key}"
            header = [*header, *(f"{name}: {line}" for line in choice.lines)]
            content = {**content, choice.section: {**content.get(choice.section, {}), choice.key: choice.value}}
    top = "".join(f"# {line}\n" for line in header)
    return top + write_yaml(content, allow_unicode=True) + "engine:\n" + textwrap.indent("".join(engine), "  ")
