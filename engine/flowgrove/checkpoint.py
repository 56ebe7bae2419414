"""Checkpoints: trainable weights and optimiser state as safetensors, the rest as JSON. A folder bears its name only when it is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.optimizers import load_state_tensors, state_tensors
from flowgrove.update import Updater

_FORMAT = 1


def save_checkpoint(run: Path, policy: Policy, updater: Updater, completed: int, fingerprint: str, keep_last: int, line: dict[str, Any]) -> Path:
    """Writes checkpoints/step_NNNNNN (NNNNNN: completed iterations), moves `latest`, removes all but the newest `keep_last`."""
    folder = run / "checkpoints" / f"step_{completed:06d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trainable = policy.trainable()
    tensors = {"weights": {name: p.detach().contiguous() for name, p in trainable.items()}, "optimizer": state_tensors(updater.optimizer, trainable)}
    if updater.ema is not None:
        tensors["ema"] = {name: average.contiguous() for name, average in updater.ema.average.items()}
    try:
        for name, content in tensors.items():
            save_file(content, partial / f"{name}.safetensors")
    except SafetensorError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {folder}: {error}; free some space and give the same command again") from None
    state = {"format": _FORMAT, "completed_iterations": completed, "recipe": fingerprint, "line": line, "token_budget": policy.budget.tokens}
    (partial / "state.json").write_text(json.dumps(state))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _point_latest(run, folder.name)
    checkpoints = valid_checkpoints(run)
    place = checkpoints.index(folder)
    for other in (*checkpoints[: max(0, place + 1 - keep_last)], *checkpoints[place + 1 :]):  # later ones: of a branch that a resumed run has left
        shutil.rmtree(other)
    return folder


def load_checkpoint(folder: Path, policy: Policy, updater: Updater | None) -> tuple[int, dict[str, Any]]:
    """Puts weights in place (with `updater` its state too; without, the averaged weights if there are any); returns the completed iterations and
    the metrics line of the last one.

    Raises UserError if it does not fit.
    """
    state = read_state(folder)
    averages = folder / "ema.safetensors"
    # without an updater the model is wanted for evaluation, sampling or export: there the averaged weights serve, if there are any
    weights = _tensors(averages if updater is None and averages.is_file() else folder / "weights.safetensors")
    moments = _tensors(folder / "optimizer.safetensors") if updater else {}
    parameters = policy.trainable()
    if set(weights) != set(parameters) or any(weights[n].shape != p.shape for n, p in parameters.items()):
        raise UserError(f"{folder} holds other weights than this recipe trains: resume with the recipe.yaml of its run")
    if updater is not None:
        try:
            load_state_tensors(updater.optimizer, parameters, moments)
        except ValueError:
            raise UserError(f"{folder / 'optimizer.safetensors'} holds no state of this update.optimizer: resume from another checkpoint") from None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    policy.refresh()
    if updater is not None and updater.ema is not None:
        updater.ema.average = {name: tensor.to(policy.device) for name, tensor in _tensors(averages).items()}
    return int(state["completed_iterations"]), state["line"]


def valid_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run that bear their name, the oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit())


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that can be read; None if there is none at all. Raises UserError if there are some and each is damaged."""
    damage: UserError | None = None
    for folder in reversed(valid_checkpoints(run)):
        try:
            read_state(folder)
            for file in {folder / "weights.safetensors", folder / "optimizer.safetensors", *folder.glob("*.safetensors")}:
                with safe_open(file, "pt"):
                    pass
        except UserError as error:
            damage = damage or error
        except (OSError, SafetensorError):
            damage = damage or _damaged(folder)
        else:
            return folder
    if damage is not None:
        raise damage
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: completed_iterations, recipe, line, and token_budget unless it is older than that. Raises UserError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not {"completed_iterations", "recipe", "line"} <= set(state):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise _damaged(folder) from None
    return state


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError):
        raise _damaged(file.parent) from None


def _damaged(folder: Path) -> UserError:
    return UserError(f"{folder} is not a complete checkpoint: remove it to go on from the one before, or give a folder checkpoints/step_NNNNNN of a run")


def _point_latest(run: Path, name: str) -> None:
    temporary = run / "latest.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(Path("checkpoints") / name)
    temporary.replace(run / "latest")


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
