"""σ tables: the noise levels of a schedule, from 1 down to 0, also between two entries (compressed tails need that).

t_i = 1 − i/T;   σ = shift·t/((1 − t) + shift·t)      exactly 1 and 0 at the ends, for every shift
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.models.families import boundary_of, configuration_folder, family_of, read_geometry
from flowgrove.recipe.schema import Model, Recipe

DynamicShift = Callable[[Mapping[str, Any], int, int], float]


@dataclass(frozen=True)
class SigmaTable:
    """σ at a position in [0, T], which need not be whole; where the table comes from, for people; and of a model with
    two experts the least σ of the one for high noise.
    """

    at: Callable[[float], float]
    source: str
    boundary: float | None = None

    def __call__(self, position: float) -> float:
        return self.at(position)


def shifted_sigmas(steps: int, shift: float) -> SigmaTable:
    """Uniform in t before the shift (Esser et al. 2403.03206)."""

    def sigma(position: float) -> float:
        t = 1.0 - position / steps
        return shift * t / ((1.0 - t) + shift * t)

    return SigmaTable(sigma, f"rollout.shift {shift:g}")


def listed_sigmas(values: Sequence[float], source: str = "a given table") -> SigmaTable:
    """A foreign table of T + 1 values, linear between its entries.
    Raises UserError unless it falls strictly from at most 1 to exactly 0.
    """
    if len(values) < 2 or values[-1] != 0.0 or not values[0] <= 1.0 or not all(b < a for a, b in pairwise(values)):
        raise UserError(
            "the pipeline's sigma table does not fall from 1 to 0: set rollout.shift to a number (3.0) instead of null"
        )

    def sigma(position: float) -> float:
        low = min(int(position), len(values) - 2)
        share = position - low
        return values[low] * (1 - share) + values[low + 1] * share if share < 1 else values[low + 1]

    return SigmaTable(sigma, source)


def scheduler_sigmas(
    folder: Path, steps: int, tokens: int, gives_table: bool = False, shift: DynamicShift = Adapter.dynamic_shift,
    own: Sequence[float] | None = None,
) -> SigmaTable:  # fmt: skip
    """The table of the scheduler in `folder`/scheduler, as its pipeline would set it for `tokens` picture tokens. Loads
    no model.

    `gives_table`: the pipeline hands its scheduler 1 … 1/steps to shift; else it leaves the
    unshifted table to the scheduler. `shift`: what it gives for mu, of the scheduler's configuration, tokens and steps.
    `own`: σ of the pipeline's in place of 1 … 1/steps.
    """
    if own is not None and len(own) != steps:
        what = f"the pipeline's own table has {len(own)} steps, not {steps}"
        steps_too = f"write {len(own)} as rollout.steps and leave run.eval.steps out"
        raise UserError(f"rollout.shift is null, but {what}: {steps_too}, or set rollout.shift")
    config_file = folder / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        name = str(config["_class_name"])
    except OSError as error:
        raise UserError(
            f"rollout.shift is null, but {config_file} cannot be read ({error.strerror}): set rollout.shift to a number"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"rollout.shift is null, but {config_file} is no scheduler configuration: download the file anew, "
            "or set rollout.shift"
        ) from None
    import diffusers

    kind = getattr(diffusers, name, None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not known or not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise UserError(
            f"rollout.shift is null, but {config_file} names {name}, which is no flow-matching scheduler: "
            "set rollout.shift to a number"
        )
    try:
        table = np.linspace(1.0, 1.0 / steps, steps) if own is None else np.array(own)
        values, source = _scheduled(kind, config, steps, tokens, table if gives_table else None, shift)
    except Exception as error:  # what libraries raise over foreign settings has many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"{config_file} does not give a table of {steps} steps ({name}: {reason})"
        raise UserError(f"rollout.shift is null, but {what}: set rollout.shift to a number") from None
    return listed_sigmas(values, source)


def _scheduled(
    kind: Any, config: dict[str, Any], steps: int, tokens: int, table: Any, shift: DynamicShift
) -> tuple[list[float], str]:
    name = kind.__name__
    scheduler = kind.from_config(config)
    keywords: dict[str, Any] = {}
    source = f"{name} of the pipeline, shift {config.get('shift', config.get('flow_shift', 1.0)):g}"
    if config.get("use_dynamic_shifting"):
        keywords["mu"] = shift(config, tokens, steps)
        source = f"{name} of the pipeline, dynamic shift mu {keywords['mu']:.3g} for {tokens} picture tokens"
    if table is not None:
        keywords["sigmas"] = table
    accepted = signature(scheduler.set_timesteps).parameters
    if foreign := [key for key in keywords if key not in accepted]:
        raise ValueError(f"it takes no {foreign[0]}, which the pipeline gives its scheduler")
    scheduler.set_timesteps(steps, **keywords)
    return [float(s) for s in np.asarray(scheduler.sigmas, dtype=np.float64)], source


def tail_steps(remaining: int, compress: float) -> int:
    """How many steps the compressed tail takes in place of the remaining ones."""
    return max(1, round_half_up(remaining * compress))


def round_half_up(value: float) -> int:
    """The nearest whole number, halves upwards; a product that misses a half by a float's rounding counts as one."""
    return math.floor(round(value, 9) + 0.5)


def recipe_sigmas(recipe: Recipe) -> SigmaTable:
    """The table of a recipe: its shift, or the scheduler of its pipeline. Loads no model. Raises UserError."""
    rollout = recipe.rollout
    if rollout.shift is not None:
        return replace(shifted_sigmas(rollout.steps, rollout.shift), boundary=_boundary(recipe.model))
    folder, family = configuration_folder(recipe.model), family_of(recipe.model.adapter)
    tokens = read_geometry(folder, recipe.model).picture_tokens
    own = family.own_sigmas(folder)
    table = scheduler_sigmas(folder, rollout.steps, tokens, family.gives_table, family.dynamic_shift, own)
    return replace(table, boundary=boundary_of(folder, recipe.model))


def _boundary(model: Model) -> float | None:
    """That of a recipe's pipeline. Where it is not on this machine there is a plan of one transformer."""
    try:
        folder = configuration_folder(model)
    except UserError:
        return None
    return boundary_of(folder, model)
