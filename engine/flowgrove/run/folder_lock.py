"""One run at a time in a run folder: a file that names the host and the process whose run it is.

On one machine the kernel knows whether that process still runs (flock ends with it). Elsewhere its file tells: a thread
touches it every few seconds, and a file that nobody has touched for two minutes is taken over.
"""

import fcntl
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flowgrove.errors import UserError
from flowgrove.files import partial_name

NAME = ".lock"
_TOUCH, _STALE = 15.0, 120.0  # seconds
_mine: dict[Path, "FolderLock"] = {}  # of this process, by folder


class FolderLock:
    """Taken when made, until `release`. Raises UserError while another process has it; this one may take it anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.resolve() / NAME
        earlier = _mine.pop(self.path, None)
        if earlier is not None:
            earlier.release()
        self._me: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
        self.made = _missing_folders(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._reading = self._take(), threading.Lock()
        self._released = threading.Event()
        threading.Thread(target=self._keep_fresh, name="folder lock", daemon=True).start()
        _mine[self.path] = self

    @property
    def released(self) -> bool:
        """Whether others may have it."""
        return self._released.is_set()

    def check(self) -> None:
        """Raises UserError if another process has the folder now, as after a machine has slept. From any thread."""
        with self._reading:
            holder = _holder(self._file)
        if not self.released and (holder != self._me or not _is_open_file(self._file, self.path)):
            who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"
            way = "end that one, or give another --out"
            raise UserError(f"{self.path.parent} was taken over by {who} while this run slept: {way}")

    def release(self) -> None:
        """Others may have the folder now. Folders that were made for the lock and hold nothing else go with it."""
        if self._released.is_set():
            return
        self._released.set()
        if _mine.get(self.path) is self:
            del _mine[self.path]
        with suppress(OSError):
            if _is_open_file(self._file, self.path) and _holder(self._file) == self._me:
                self.path.unlink()
        self._file.close()
        for folder in self.made:
            with suppress(OSError):
                folder.rmdir()

    def _take(self) -> IO[str]:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            try:
                knows_flock = _flock(file, self.path)
                if not _is_open_file(file, self.path):  # its holder has just released it
                    file.close()
                    continue
                self._check_holder(file, knows_flock)
            except BaseException:
                file.close()
                raise
            file.truncate(0)
            file.write(json.dumps(self._me) + "\n")
            file.flush()
            return file

    def _check_holder(self, file: IO[str], knows_flock: bool) -> None:
        holder = _holder(file)
        if not holder:
            return
        here = holder.get("host") == socket.gethostname()
        alive = not knows_flock and _is_alive(holder.get("process")) if here else _age(self.path) < _STALE
        if alive:
            raise _in_use(self.path, holder, here)

    def _keep_fresh(self) -> None:
        while not self._released.wait(_TOUCH):
            with suppress(OSError, ValueError):  # ValueError: closed meanwhile
                os.utime(self._file.fileno())


def _flock(file: IO[str], path: Path) -> bool:
    """False where the folder's file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(file)
        raise _in_use(path, holder, holder.get("host") == socket.gethostname()) from None
    except OSError:
        return False
    return True


def _in_use(path: Path, holder: dict[str, Any], here: bool) -> UserError:
    who = f"process {holder.get('process', 'unknown')} on {holder.get('host', 'an unknown host')}"
    wait = "" if here else f", or wait {_STALE:.0f} seconds if it has died"
    return UserError(f"{path.parent} is in use by another run, {who}: give another --out, or end that process{wait}")


def _holder(file: IO[str]) -> dict[str, Any]:
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(process: object) -> bool:
    if not isinstance(process, int) or not 0 < process < 2**31 or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock of its own file system."""
    probe = partial_name(path)
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - path.stat().st_mtime


def _is_open_file(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _missing_folders(folder: Path) -> list[Path]:
    """The innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]
