"""σ tables: the noise levels of a schedule, from 1 down to 0, also between two entries (compressed tails need that).

t_i = 1 − i/T;   σ = shift·t/((1 − t) + shift·t)      exactly 1 and 0 at the ends, for every shift
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError
from flowgrove.models.folders import model_folder
from flowgrove.recipe import Model, Recipe

SigmaTable = Callable[[float], float]  # σ at a position in [0, T], which need not be whole


def shifted_sigmas(steps: int, shift: float) -> SigmaTable:
    """Uniform in t before the shift (Esser et al. 2403.03206)."""

    def sigma(position: float) -> float:
        t = 1.0 - position / steps
        return shift * t / ((1.0 - t) + shift * t)

    return sigma


def listed_sigmas(values: Sequence[float]) -> SigmaTable:
    """A foreign table of T + 1 values, linear between its entries. Raises UserError unless it falls strictly from at most 1 to exactly 0."""
    if len(values) < 2 or values[-1] != 0.0 or not values[0] <= 1.0 or not all(b < a for a, b in pairwise(values)):
        raise UserError("the pipeline's sigma table does not fall from 1 to 0: set rollout.shift to a number (3.0) instead of null")

    def sigma(position: float) -> float:
        low = min(int(position), len(values) - 2)
        share = position - low
        return values[low] * (1 - share) + values[low + 1] * share if share < 1 else values[low + 1]

    return sigma


def scheduler_sigmas(folder: Path, steps: int, tokens: int) -> SigmaTable:
    """The table of the scheduler in `folder`/scheduler, as its pipeline would set it for `tokens` picture tokens. Loads no model."""
    config_file = folder / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except OSError as error:
        raise UserError(f"rollout.shift is null, but {config_file} cannot be read ({error.strerror}): set rollout.shift to a number") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"rollout.shift is null, but {config_file} is no scheduler configuration: download the file anew, or set rollout.shift") from None
    import diffusers
    import numpy as np

    kind = getattr(diffusers, name, None)
    if kind is None or not name.startswith("FlowMatch"):
        raise UserError(f"rollout.shift is null, but {config_file} names {name}, which is no flow-matching scheduler: set rollout.shift to a number")
    scheduler = kind.from_config(config)
    keywords = {}
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
        keywords = {"mu": config.get("base_shift", 0.5) + slope * (tokens - low)}
    scheduler.set_timesteps(steps, **keywords)
    return listed_sigmas([float(s) for s in np.asarray(scheduler.sigmas, dtype=np.float64)])


def recipe_sigmas(recipe: Recipe) -> SigmaTable:
    """The table of a recipe: its shift, or the scheduler of its pipeline. Loads no model. Raises UserError."""
    rollout = recipe.rollout
    if rollout.shift is not None:
        return shifted_sigmas(rollout.steps, rollout.shift)
    folder = model_folder(recipe.model)
    return scheduler_sigmas(folder, rollout.steps, picture_tokens(folder, recipe.model))


def picture_tokens(folder: Path, model: Model) -> int:
    """Picture tokens of one sample, from the configuration files alone."""
    transformer, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae"))
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = (size or transformer["sample_size"] * scale for size in (model.height, model.width))
    unit = scale * transformer["patch_size"]
    return (height // unit) * (width // unit)
