"""engine.token_budget: auto. On a GPU it is settled once per run by timing passes of the run's own model; on a CPU it
is a fixed number of tokens, so that runs repeat to the last bit.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory, total_memory
from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner, tokens_per_pass
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.memory import LOADED, Fit
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup
from flowgrove.tuning.pass_times import NEAR, Passes, Work, first_near_best

_REPEATS = 3
_log = logging.getLogger("flowgrove")


def fastest_rows(measure: Callable[[int], float], most: int) -> int:
    """Rows per pass: of 1, 2, 4, … up to `most` the fewest that are as fast as the fastest. `measure(rows)`: seconds
    per row.

    Ends where memory is exhausted in `measure`, or a doubling gains less than NEAR. Raises UserError if one row does
    not fit.
    """
    found: dict[int, float] = {}
    rows = 1
    while rows <= most:
        try:
            found[rows] = measure(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if rows > 1 and found[rows] > (1 - NEAR) * found[rows // 2]:
            break
        rows *= 2
    if not found:
        raise no_room()
    return first_near_best(found)


def no_room() -> UserError:
    """What to say where not even a pass of one row fits."""
    return UserError(
        "the GPU's memory does not hold a training pass of one row: set model.gradient_checkpointing: offload, "
        "give a model.lora, or lower model.height and width"
    )


def settle_token_budget(
    setup: Setup, policy: Policy, runner: PassRunner, stored: int | None, division: Division = ALONE
) -> None:
    """engine.token_budget: auto: `stored` by the run's checkpoint; else, on a GPU, what was found for this recipe on
    such a device before, or is found now.

    Raises UserError if a training pass of one row does not fit.
    """
    recipe = setup.recipe
    if recipe.engine.token_budget != "auto":
        return
    if stored is None and policy.device.type == "cuda":
        key = cache_key(recipe, torch.cuda.get_device_name(policy.device))
        stored = cached_budget(key)
        if stored is None:
            stored = measured_budget(setup, policy, runner, division)
            cache_budget(key, stored)
    if stored is not None:
        runner.budget.resize(stored)


def settle_meetings(setup: Setup, policy: Policy, runner: PassRunner, stored: int | None, division: Division) -> None:
    """The same where ranks have divided the weights, and whether updates reshard (engine.reshard_after_forward: auto).
    On a GPU both are predicted, since passes that are timed would be meetings; on a CPU, whose memory is not only ours,
    passes are as large as ever, and nothing reshards unasked.

    Raises UserError if a training pass of one row does not fit.
    """
    engine, kind = setup.recipe.engine, policy.device.type
    fit: Fit | None = Fit(tokens_per_pass(setup.recipe, kind), engine.reshard_after_forward is True)
    if kind == "cuda":
        model = setup.memory(kind, division)
        foreign = max(0, policy.bytes_when_loaded - model.at(policy.adapter.geometry.tokens).loaded)
        fit = model.fitting(total_memory(policy.device), foreign)  # beside models of rewards
    if fit is None:
        raise no_room()
    policy.weights.reshard(fit.reshard)
    # a checkpoint may be one of more ranks, which had more room
    at_most = stored if stored is not None and engine.token_budget == "auto" else fit.tokens
    runner.budget.resize(min(at_most, fit.tokens))


def measured_budget(setup: Setup, policy: Policy, runner: PassRunner, division: Division = ALONE) -> int:
    """Tokens per pass that take the passes of iteration 0 through the policy's model fastest, beside all that a run
    keeps in memory. Raises UserError.
    """
    work, passes = Work.of(setup), Passes(policy, runner)

    def measure(rows: int) -> float:
        passes.release()
        return work.seconds(passes.timed(rows, _REPEATS))

    try:
        beside = room_beside(setup, policy, division)
        rows = fastest_rows(measure, work.widest)
        del beside
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise no_room() from None
        raise
    finally:
        passes.release()
    _log.info("engine.token_budget: auto is %d tokens, %d rows per pass", rows * passes.tokens, rows)
    return rows * passes.tokens


def room_beside(setup: Setup, policy: Policy, division: Division = ALONE) -> Tensor:
    """As many bytes as a run keeps besides model and gradients: the optimiser's, averages, forest, prompts."""
    resident = setup.memory(policy.device.type, division).resident(tokens_per_pass(setup.recipe, policy.device.type))
    size = sum(size for name, size in resident.items() if name not in (*LOADED, "gradients"))
    return torch.empty(size, dtype=torch.uint8, device=policy.device)


def cache_key(recipe: Recipe, device_name: str) -> str:
    """Names what was measured: the recipe without `run`, but for the copy of the untouched model that it may ask for,
    on this device with this torch.
    """
    recipe_part = recipe.model_dump(mode="json", exclude={"run"})
    content = [recipe_part, recipe.uses_reference, torch.__version__, device_name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cached_budget(key: str) -> int | None:
    """Tokens; None if none were written under `key`, or the file cannot be read."""
    tokens = _read_cache().get(key)
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def cache_budget(key: str, tokens: int) -> None:
    """Writes `tokens` down for later runs; a folder that cannot be written costs them the measurement,
    and is no error.
    """
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_text(_cache_file(), json.dumps({**_read_cache(), key: tokens}, indent=1) + "\n")
    except OSError as error:
        _log.warning(
            "cannot write %s (%s): the next run measures engine.token_budget again", _cache_file(), error.strerror
        )


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowgrove" / "budgets.json"


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
