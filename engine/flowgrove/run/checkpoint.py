"""Checkpoints: trainable weights and optimiser state as safetensors, the rest as JSON.
A folder bears its name only when it is complete.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowgrove.errors import UserError
from flowgrove.files import follow_umask, partial_name, write_text
from flowgrove.models.policy import Policy
from flowgrove.run.manifest import FORMAT, DamagedError, bears_a_number, unreadable, verify, write_manifest
from flowgrove.update.optimizers import load_state_tensors, state_tensors
from flowgrove.update.updater import Updater

Say = Callable[[str], None]
_BEST = "best.json"
_LEFT_BEHIND = re.compile(r"\.?step_\d+.*\.partial")
_log = logging.getLogger("flowgrove")


def save_checkpoint(
    run: Path, policy: Policy, updater: Updater, completed: int, fingerprint: str, keep_last: int, line: dict[str, Any]
) -> Path:
    """Writes checkpoints/step_NNNNNN (NNNNNN: completed iterations), moves `latest`, removes all but the newest
    `keep_last` and the best."""
    folder = run / "checkpoints" / f"step_{completed:06d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.iterdir():  # by runs that were killed: whoever saves has the folder for himself
        if _LEFT_BEHIND.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)
    trainable = policy.weights.trainable()
    tensors = {
        "weights": {name: p.detach().contiguous() for name, p in trainable.items()},
        "optimizer": state_tensors(updater.optimizer, trainable),
    }
    if updater.ema is not None:
        tensors["ema"] = {name: average.contiguous() for name, average in updater.ema.average.items()}
    state = {
        "format": FORMAT,
        "completed_iterations": completed,
        "recipe": fingerprint,
        "line": line,
        "token_budget": updater.runner.budget.tokens,
    }
    partial = partial_name(folder)
    partial.mkdir()
    try:
        for name, content in tensors.items():
            save_file(content, partial / f"{name}.safetensors")
        write_manifest(partial, state)
        follow_umask(partial)
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except SafetensorError as error:
        denied = "denied" in str(error)
        way = "make its folder writable" if denied else "free some space and give the same command again"
        raise UserError(f"cannot write {folder}: {error}; {way}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _point_latest(run, folder.name)
    remove_older(run, folder, keep_last)
    return folder


def remove_older(run: Path, newest: Path, keep_last: int) -> None:
    """Leaves the `keep_last` checkpoints up to `newest`, and the best;
    later ones are of a branch that a resumed run has left.
    """
    checkpoints, best = valid_checkpoints(run), best_checkpoint(run)
    place = checkpoints.index(newest)
    older = [folder for folder in checkpoints[: max(0, place + 1 - keep_last)] if best is None or folder != best[0]]
    for other in (*older, *checkpoints[place + 1 :]):
        _remove(other)


def load_checkpoint(folder: Path, policy: Policy, updater: Updater | None) -> tuple[int, dict[str, Any]]:
    """Puts weights in place (with `updater` its state too; without, the averaged weights if there are any); returns the
    completed iterations and the metrics line of the last one.

    Raises UserError if it is damaged or does not fit.
    """
    state = verify(folder)
    averages = folder / "ema.safetensors"
    # without an updater the model is wanted for evaluation, sampling or export: there the averaged weights serve, if
    # there are any
    weights = _tensors(averages if updater is None and averages.is_file() else folder / "weights.safetensors")
    moments = _tensors(folder / "optimizer.safetensors") if updater else {}
    parameters = policy.weights.trainable()
    _check_fit(folder, weights, parameters, "this recipe trains: resume with the recipe.yaml of its run")
    if updater is not None and updater.ema is not None:
        average = _tensors(averages)
        _check_fit(folder, average, parameters, "this recipe averages: resume with the recipe.yaml of its run")
    if updater is not None:
        if any(
            not tensor.is_floating_point() or tensor.element_size() < 4
            for key, tensor in moments.items() if key.endswith(("/step", "/exp_avg", "/exp_avg_sq"))
        ):  # fmt: skip
            raise DamagedError(folder, "optimizer.safetensors holds numbers of another kind than was written")
        try:
            load_state_tensors(updater.optimizer, parameters, moments)
        except (ValueError, RuntimeError):
            what = f"{folder / 'optimizer.safetensors'} holds no state of this update.optimizer"
            raise UserError(f"{what}: resume from another checkpoint") from None
    policy.weights.load(weights)
    if updater is not None and updater.ema is not None:
        updater.ema.load(average)
    return int(state["completed_iterations"]), state["line"]


def valid_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run that bear their name, the oldest first."""
    found = [p for p in (run / "checkpoints").glob("step_*") if bears_a_number(p) and p.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def newest_checkpoint(run: Path, say: Say = _log.warning) -> Path | None:
    """The newest checkpoint that is as it was written, `say` names those that are not; None if there is none at all.

    Raises UserError if there are some and each is damaged, or if one may not be read.
    """
    damaged: list[DamagedError] = []
    for folder in reversed(valid_checkpoints(run)):
        try:
            verify(folder)
        except DamagedError as error:
            damaged.append(error)
        else:
            for one in damaged:
                say(f"{one.folder} is damaged ({one.what}): going on from {folder.name} instead")
            return folder
    if damaged:
        raise damaged[0]
    return None


def find_checkpoint(run: Path, which: str | None) -> Path:
    """Of a run folder the newest one (None), that of N iterations ("N"), the best ("best"), or whatever folder is
    named.

    Older weights are no stand-in for damaged ones: whoever wants them names them. Raises UserError.
    """
    checkpoints = valid_checkpoints(run)
    if which is None:
        if not checkpoints:
            ways = "give the folder of a run that has written one, or a recipe for the base model"
            raise UserError(f"{run} holds no checkpoint: {ways}")
        return checkpoints[-1]
    if which == "best":
        best = best_checkpoint(run)
        if best is None:
            ways = f"train with run.keep_best: true and held-out prompts, or give {_choices(checkpoints)}"
            raise UserError(f"{run} has no best checkpoint: {ways}")
        return best[0]
    if which.isdecimal() and which.isascii():
        found = [folder for folder in checkpoints if int(folder.name[5:]) == int(which[:20])]
        if not found:
            raise UserError(f"--checkpoint {which[:40]}: {run} has no such checkpoint: give {_choices(checkpoints)}")
        return found[0]
    return pointed_at(Path(which))


def pointed_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or where `latest` of a run points, be it a link or a text file.

    Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path} is not a checkpoint: there is no such folder; give checkpoints/step_NNNNNN of a run")
    if not path.is_file():
        return path
    try:
        name = path.read_text(encoding="utf-8").strip() if path.stat().st_size < 1000 else ""
    except (OSError, ValueError):
        name = ""
    target = path.parent / name
    if not name or "\0" in name or not target.is_dir():
        raise UserError(f"{path} is not a checkpoint: give a folder checkpoints/step_NNNNNN of a run")
    return target


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The checkpoint that scored best on the held-out prompts, and its score; None without `run.keep_best`, or if it is
    gone."""
    try:
        told = json.loads((run / _BEST).read_text(encoding="utf-8"))
        folder = run / "checkpoints" / f"step_{int(told['completed_iterations']):06d}"
        reward = float(told["eval_reward"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return (folder, reward) if folder.is_dir() else None


def mark_best(folder: Path, reward: float) -> None:
    """From now on this checkpoint of a run is its best."""
    told = {"completed_iterations": int(folder.name[5:]), "eval_reward": reward}
    write_text(folder.parents[1] / _BEST, json.dumps(told) + "\n")


def _choices(checkpoints: list[Path]) -> str:
    numbers = " or ".join(str(int(folder.name[5:])) for folder in checkpoints)
    return numbers or "the folder of a run that has written one"


def _check_fit(folder: Path, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], whose: str) -> None:
    if set(tensors) != set(parameters) or any(tensors[n].shape != p.shape for n, p in parameters.items()):
        raise UserError(f"{folder} holds other weights than {whose}")
    odd = {tensor.dtype for tensor in tensors.values()} - {torch.float32, torch.float64}
    if odd:  # master weights are never anything else
        kinds = sorted(str(dtype).removeprefix("torch.") for dtype in odd)
        raise DamagedError(folder, f"weights of {', '.join(kinds)}")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except OSError as error:
        raise unreadable(file, file.parent, error) from None
    except SafetensorError:
        raise DamagedError(file.parent, f"{file.name} is no whole safetensors file") from None


def _point_latest(run: Path, name: str) -> None:
    """A relative link; a text file with the same words where there are no links, as on FAT and some network folders."""
    latest = run / "latest"
    temporary = partial_name(latest)
    target = Path("checkpoints") / name
    try:
        temporary.symlink_to(target)
        temporary.replace(latest)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        try:
            write_text(latest, f"{target.as_posix()}\n")
        except OSError as error:
            _log.warning("%s cannot be made to point to %s: %s", latest, target, error.strerror)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
