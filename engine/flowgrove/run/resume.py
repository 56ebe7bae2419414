"""Where a run goes on: which checkpoint fits which recipe."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.recipe.deciding import deciding
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.run.finding import Say, newest_checkpoint, pointed_at, valid_checkpoints
from flowgrove.run.manifest import read_state, verify
from flowgrove.run.metrics import read_metrics
from flowgrove.setup import Setup

_log = logging.getLogger("flowgrove")
_BUDGETS = "token_budget*.json"
_MOST_NAMED = 4  # keys that a message names


def differences(recipe: Recipe, out: Path) -> list[tuple[str, Any, Any]]:
    """The keys in which `recipe` is another than that of the run in `out`, with both values.

    Raises UserError or OSError if that one cannot be read.
    """
    here, there = (deciding(one, exclude_defaults=False) for one in (recipe, load_recipe(out / "recipe.yaml")))
    for content in (here, there):
        for key in ("prompts", "eval_prompts"):
            content["data"].pop(key, None)
    return list(_differing(here, there))


def finished(setup: Setup, out: Path) -> bool:
    """Whether `out` holds all of the set-up's run: its last checkpoint, every line and the report. Reads no model."""
    checkpoints = valid_checkpoints(out)
    if not checkpoints or not (out / "report.html").exists():
        return False
    try:
        state = read_state(checkpoints[-1])
        done = state["completed_iterations"]
        if not setup.is_of(state["recipe"]) or done < setup.recipe.run.iterations:
            return False
        verify(checkpoints[-1])
    except UserError:
        return False  # whoever goes on will say what is wrong with it
    return any(line["iteration"] == done - 1 for line in read_metrics(out))


def command_again(resume: str) -> str:
    """How errors call the command that goes on from what a run has saved: another start from the same place, or a fresh
    one, is not meant.
    """
    return "the same command" if resume == "auto" else "the same command without --resume"


def choose_checkpoint(
    setup: Setup, out: Path, resume: str, say: Say = _log.warning, force: bool = False
) -> Path | None:
    """The checkpoint to start from; `say` names damaged ones that were passed over, and what is another in the recipe
    where `force` lets a run go on with that.

    Raises UserError if `out` holds a run that may not be touched, or `resume` names no checkpoint.
    """
    holds_run = (out / "metrics.jsonl").exists() or bool(valid_checkpoints(out))
    if resume not in ("auto", "never"):
        chosen = Path(resume)
        if chosen.exists():
            chosen = pointed_at(chosen)
        inside = chosen.resolve().parent.parent == out.resolve()
        if holds_run and not inside:
            raise UserError(f"{out} holds a run, and {chosen} is no checkpoint of it: give another --out")
        state = verify(pointed_at(chosen))
        if inside:
            check_same_lora(setup, state, chosen)
        if inside and not setup.is_of(state["recipe"]):
            ways = f"train on from it into another --out, or resume with {out / 'recipe.yaml'}"
            _check_changes(setup.recipe, out, f"{chosen} was written by another recipe", ways, say if force else None)
        return chosen
    if resume == "never":
        if holds_run:
            raise UserError(f"{out} holds a run: give another --out, or --resume auto to go on with it")
        return None
    folder = newest_checkpoint(out, say)
    if folder is not None:
        check_same_lora(setup, read_state(folder), folder)
    if folder is not None and not setup.is_of(read_state(folder)["recipe"]):
        ways = f"give another --out, or resume with {out / 'recipe.yaml'}"
        _check_changes(setup.recipe, out, f"{out} holds a run of another recipe", ways, say if force else None)
    return folder


def check_same_lora(setup: Setup, state: dict[str, Any], checkpoint: Path) -> None:
    """Raises UserError where model.init_lora holds another file than when the run of `checkpoint` began, on which its
    weights sit.
    """
    began, now = state.get("initial_lora"), setup.initial_lora
    if began is not None and now is not None and began != now:
        place = setup.recipe.model.init_lora
        where = "" if place is None else f" {place.path}"
        what = f"model.init_lora.path{where} holds another LoRA than when {checkpoint} was trained"
        raise UserError(f"{what}: give the file that it began with")


def _check_changes(recipe: Recipe, out: Path, what: str, ways: str, say: Say | None) -> None:
    """Raises UserError for another recipe than that of the run in `out`, unless `say` is given, which is told of it,
    and its checkpoints mean the same in both.
    """
    try:
        found = differences(recipe, out)
    except (UserError, OSError):
        file = out / "recipe.yaml"
        raise UserError(
            f"{what}: its {file} cannot be read, so that the keys that differ are not known: {ways}"
        ) from None
    lasting = [one for one in found if _is_lasting(*one)]
    if lasting:
        if say is None:
            raise UserError(f"{what}: {phrase(found)}: {ways}")
        raise UserError(f"{what}, and --force cannot change what its checkpoints hold: {phrase(lasting)}: {ways}")
    if say is None:
        raise UserError(f"{what}: {phrase(found)}: {ways}, or --force to go on with the recipe as it is now")
    say(f"{what}: going on all the same, as --force says: {phrase(found)}")


def _is_lasting(key: str, own: Any, old: Any) -> bool:
    """Whether a checkpoint holds other tensors, or means other things with them, when this key has changed."""
    if key == "update.ema_decay":
        return (own is None) != (old is None)
    return key == "update.optimizer" or key.partition(".")[0] == "model"


def phrase(found: list[tuple[str, Any, Any]]) -> str:
    """What `differences` has found, in words."""
    named = [f"{key} is {_shown(own)} instead of the run's {_shown(old)}" for key, own, old in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        named.append(f"{len(found) - _MOST_NAMED} more keys differ")
    return ", ".join(named) or (
        "data.prompts holds other prompts than when it began, or model.init_lora another LoRA, or --force has changed "
        "a key since"
    )


def stored_budget(checkpoint: Path | None, own: str) -> int | None:
    """Tokens per pass of the run that goes on from `checkpoint`; None for a new run, a checkpoint of another recipe
    than that of fingerprint `own`, and one from before they were stored.
    """
    state = {} if checkpoint is None else read_state(checkpoint)
    tokens = state.get("token_budget")
    return tokens if state.get("recipe") == own and isinstance(tokens, int) and tokens > 0 else None


def remember_budget(out: Path, tokens: int) -> None:
    """From here on passes of the run in `out` hold no more than `tokens`. Two ranks whose memory is full at once write
    two files, so that neither takes the other's place.
    """
    write_text(out / _BUDGETS.replace("*", f"_{tokens}"), json.dumps({"tokens": tokens}) + "\n")


def remembered_budget(out: Path) -> int | None:
    """The least that `remember_budget` wrote; None if it never did, or nothing of it can be read."""
    return min(filter(None, map(_budget_in, out.glob(_BUDGETS))), default=None)


def _budget_in(file: Path) -> int | None:
    try:
        tokens = json.loads(file.read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _differing(here: Any, there: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(section.key, value here, value there), as deep as both have the same sections; entries of lists by number."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        here, there = dict(enumerate(here)), dict(enumerate(there))
    if isinstance(here, dict) and isinstance(there, dict):
        for name in {**there, **here}:
            yield from _differing(here.get(name), there.get(name), f"{key}.{name}" if key else f"{name}")
    elif here != there:
        yield key, here, there


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
