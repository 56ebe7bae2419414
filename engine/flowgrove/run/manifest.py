"""What makes a checkpoint whole: manifest.json holds the size and SHA-256 of every tensor file, and the state once
more.

Format 2 has a file for each kind of tensors, format 3 a folder of files of several ranks. Checkpoints of format 1 are
older than manifests: of those, what can be seen without one is checked.
"""

import errno
import hashlib
import json
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flowgrove.errors import UserError
from flowgrove.files import why_unreadable

WHOLE, SHARDED = 2, 3  # formats that are written
MANIFEST, _STATE, _TENSORS = "manifest.json", "state.json", ".safetensors"
_ADDED_LATER = frozenset({"token_budget"})  # keys that a state of format 1 or 2 may lack
Files = dict[str, dict[str, int | str]]  # name in the checkpoint's folder → bytes and sha256
_RACY = 2.0  # seconds: a file changed twice within a clock's tick bears the same times
_verified: dict[Path, tuple[object, dict[str, Any]]] = {}


class DamagedError(UserError):
    """A checkpoint that is not as it was written. Another one may serve."""

    def __init__(self, folder: Path, what: str) -> None:
        ways = "remove it to go on from the one before, or give another checkpoints/step_NNNNNN of a run"
        super().__init__(f"{folder} is damaged ({what}): {ways}")
        self.folder, self.what = folder, what


def described(folder: Path, names: Iterable[str]) -> Files:
    """What the manifest says of tensor files that have been written."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}


def write_manifest(folder: Path, state: dict[str, Any], files: Files) -> None:
    """Adds state.json and manifest.json to a folder that holds its tensor files."""
    (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
    manifest = {"format": 1, "files": files, "state": state}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint that is as it was written. Raises DamagedError, or UserError if it may not be read."""
    begun = time.time()
    seen = _fingerprint(folder)
    known = _verified.get(folder)
    if known is not None and known[0] == seen:
        return known[1]
    state = read_state(folder)
    manifest = _read_json(folder / MANIFEST, missing_ok=state["format"] == 1)
    try:
        if manifest is None:
            _check_headers(folder)
        else:
            _check_manifest(folder, state, manifest)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), folder, error) from None
    if seen and all(changed < begun - _RACY for _, _, changed in seen):
        _verified[folder] = (seen, state)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: format, completed_iterations, recipe, line, token_budget unless it is older
    than that, splits of a run that chooses them, and initial_lora of one with model.init_lora.

    Raises DamagedError, or UserError for a folder that is no checkpoint or may not be read.
    """
    if not bears_a_number(folder) and _holds_nothing(folder):
        raise UserError(f"{folder} is not a checkpoint: give a folder checkpoints/step_NNNNNN of a run")
    state = _read_json(folder / _STATE)
    kinds: dict[str, type] = {"completed_iterations": int, "recipe": str, "line": dict}
    if state is None or not all(type(state.get(key)) is kind for key, kind in kinds.items()):
        raise DamagedError(folder, f"{_STATE} says too little")
    state.setdefault("format", 1)
    if type(state["format"]) is not int or not 1 <= state["format"] <= SHARDED:
        raise DamagedError(folder, f"{_STATE} has format {state['format']!r}, which this version does not know")
    completed = state["completed_iterations"]
    if completed < 0 or (bears_a_number(folder) and completed != int(folder.name[5:])):
        raise DamagedError(folder, f"{_STATE} is that of {completed} completed iterations")
    if state["line"].get("iteration", completed - 1) != completed - 1:
        raise DamagedError(folder, f"{_STATE} holds the line of another iteration")
    return state


def _check_manifest(folder: Path, state: dict[str, Any], manifest: dict[str, Any]) -> None:
    told, files = manifest.get("state"), manifest.get("files")
    if not (isinstance(told, dict) and isinstance(files, dict) and all(isinstance(f, dict) for f in files.values())):
        raise DamagedError(folder, f"{MANIFEST} says too little")
    if _text(state) != _text({key: value for key, value in told.items() if key in state or key not in _ADDED_LATER}):
        raise DamagedError(folder, f"{_STATE} and {MANIFEST} contradict each other")
    there, sharded = set(tensor_files(folder)), state["format"] == SHARDED
    needed = "weights/rank_00000.safetensors" if sharded else "weights.safetensors"
    if needed not in files or there != set(files) or any(("/" in name) != sharded for name in files):
        odd = sorted((there ^ set(files)) or {needed})
        raise DamagedError(folder, f"{', '.join(odd[:4])}: missing, or not in {MANIFEST}")
    for name, entry in files.items():
        _check_is_file(folder / name)
        if (folder / name).stat().st_size != entry.get("bytes"):
            raise DamagedError(folder, f"{name} has another size")
    for name, digest in _digests(folder, files).items():
        if digest != files[name].get("sha256"):
            raise DamagedError(folder, f"{name} has other content than was written")


def _check_headers(folder: Path) -> None:
    needed = {folder / "weights.safetensors", folder / "optimizer.safetensors"}
    for file in sorted(needed | set(folder.glob("*.safetensors"))):
        _check_is_file(file)
        try:
            with file.open("rb"), safe_open(file, "pt"):
                pass
        except SafetensorError:
            raise DamagedError(folder, f"{file.name} is no whole safetensors file") from None


def unreadable(file: Path, folder: Path, error: OSError) -> UserError:
    """What to raise for a file of the checkpoint `folder`: it is damaged where there is no file, else its disk or its
    permissions are at fault."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP):
        return DamagedError(folder, f"{file.name} is missing")
    return UserError(why_unreadable(file, error))


def _check_is_file(file: Path) -> None:
    """Opening a pipe would wait for ever. Raises FileNotFoundError for it, and what `stat` raises."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))


def _read_json(file: Path, missing_ok: bool = False) -> dict[str, Any] | None:
    """None: not there, where that is allowed. Raises DamagedError for anything but an object."""
    try:
        _check_is_file(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing_ok:
            return None
        raise unreadable(file, file.parent, error) from None
    except OSError as error:
        raise unreadable(file, file.parent, error) from None
    except (ValueError, RecursionError):
        raise DamagedError(file.parent, f"{file.name} is not JSON") from None
    if not isinstance(content, dict):
        raise DamagedError(file.parent, f"{file.name} says too little")
    return content


def tensor_files(folder: Path) -> list[str]:
    """Names of the tensor files of a checkpoint, in its folder and those below. Raises OSError."""
    found: list[Path] = []
    for place in folder.iterdir():
        found += [place] if place.suffix == _TENSORS else place.iterdir() if place.is_dir() else []
    return sorted(file.relative_to(folder).as_posix() for file in found if file.suffix == _TENSORS)


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time: hashing leaves the other cores alone."""
    ordered = list(names)
    with ThreadPoolExecutor(4, thread_name_prefix="sha256") as pool:
        return dict(zip(ordered, pool.map(lambda name: _digest(folder / name), ordered), strict=True))


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fingerprint(folder: Path) -> tuple[tuple[str, int, float], ...]:
    """(name, size, time of change) of its files, which do not change while these stay."""
    try:
        found = [(str(file), file.stat()) for file in sorted((*folder.iterdir(), *folder.glob("*/*")))]
    except OSError:
        return ()
    return tuple((name, told.st_size, max(told.st_ctime, told.st_mtime)) for name, told in found)


def bears_a_number(folder: Path) -> bool:
    """Whether a folder has the name of a run's checkpoint, step_NNNNNN."""
    return folder.name.startswith("step_") and folder.name[5:].isdecimal() and folder.name.isascii()


def _holds_nothing(folder: Path) -> bool:
    try:
        return not (any(file.name == _STATE for file in folder.iterdir()) or tensor_files(folder))
    except PermissionError:
        return False
    except OSError:
        return True


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)
