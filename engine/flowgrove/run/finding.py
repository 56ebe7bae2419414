"""The checkpoints of a run folder: which there are, which is meant, which stay."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from flowgrove.errors import UserError
from flowgrove.files import partial_name, write_text
from flowgrove.run.manifest import DamagedError, bears_a_number, verify

Say = Callable[[str], None]
_BEST = "best.json"
_LEFT_BEHIND = re.compile(r"\.?step_\d+.*\.partial")
_log = logging.getLogger("flowgrove")


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


class Best(NamedTuple):
    """The checkpoint that scored best on the held-out prompts, its score, and a hash of what judged it; "": unknown."""

    folder: Path
    reward: float
    judge: str


def best_checkpoint(run: Path) -> Best | None:
    """None without `run.keep_best`, or if it is gone."""
    try:
        told = json.loads((run / _BEST).read_text(encoding="utf-8"))
        folder = run / "checkpoints" / f"step_{int(told['completed_iterations']):06d}"
        reward, judge = float(told["eval_reward"]), str(told.get("judge", ""))
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return None
    return Best(folder, reward, judge) if folder.is_dir() else None


def mark_best(folder: Path, reward: float, judge: str = "") -> None:
    """From now on this checkpoint of a run is its best."""
    told = {"completed_iterations": int(folder.name[5:]), "eval_reward": reward, "judge": judge}
    write_text(folder.parents[1] / _BEST, json.dumps(told) + "\n")


def remove_older(run: Path, newest: Path, keep_last: int) -> None:
    """Leaves the `keep_last` checkpoints up to `newest`, and the best;
    later ones are of a branch that a resumed run has left.
    """
    checkpoints, best = valid_checkpoints(run), best_checkpoint(run)
    if newest not in checkpoints:  # the user has named it otherwise
        return
    place = checkpoints.index(newest)
    older = [folder for folder in checkpoints[: max(0, place + 1 - keep_last)] if best is None or folder != best[0]]
    for other in (*older, *checkpoints[place + 1 :]):
        remove(other)


def leave_later(run: Path, newest: Path) -> None:
    """Removes checkpoints after `newest`, from which the user has gone back to it: else the next start would go on from
    the branch that was left.
    """
    checkpoints = valid_checkpoints(run)
    if newest not in checkpoints:  # the user has named it otherwise
        return
    point_latest(run, newest.name)
    for other in checkpoints:
        if int(other.name[5:]) > int(newest.name[5:]):
            remove(other)


def point_latest(run: Path, name: str) -> None:
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


def remove(folder: Path) -> None:
    """Removes a checkpoint, or whatever bears its name, which it loses first: no half of one is ever called so."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    with suppress(OSError):
        if bears_a_number(folder):
            folder = folder.rename(partial_name(folder))
    shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(run: Path) -> None:
    """Removes what runs that were killed have left of checkpoints; for whoever has the folder for himself."""
    for left in (run / "checkpoints").glob("*.partial"):
        if _LEFT_BEHIND.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


def _choices(checkpoints: list[Path]) -> str:
    numbers = " or ".join(str(int(folder.name[5:])) for folder in checkpoints)
    return numbers or "the folder of a run that has written one"
