"""Files that are whole or absent: written under another name first, so that a full disk or a kill leaves no half of
one.

That other name is nobody else's, so that two jobs may write the same file: the later one wins. What is written has the
permissions that the user's umask gives to new files, whatever the library that writes it asks for.
"""

import errno
import os
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_PARTIAL = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial(\..+)?")


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in UTF-8."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills the file that it is given; `path` appears when it is complete and on disk."""
    partial = partial_name(path)
    try:
        partial.touch(exist_ok=False)
        permissions = partial.stat().st_mode
        write(partial)
        with suppress(OSError):  # some network and FAT folders know no permissions
            partial.chmod(permissions)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def partial_name(path: Path) -> Path:
    """A name beside `path` that nobody else uses, with its suffix: libraries take a format from it."""
    return path.with_name(f".{path.stem[:80]}.{os.getpid()}-{secrets.token_hex(4)}.partial{path.suffix}")


def remove_left_behind(folder: Path) -> None:
    """Removes what writers that were killed more than an hour ago have left in `folder`."""
    for file in folder.glob(".*.partial*"):
        with suppress(OSError):
            if _PARTIAL.fullmatch(file.name) and file.stat().st_mtime < time.time() - 3600:
                file.unlink()


def follow_umask(folder: Path) -> None:
    """All files in `folder` get the permissions of new files: some libraries write for the user alone."""
    probe = partial_name(folder / "mode")
    probe.touch(exist_ok=False)
    permissions = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with suppress(OSError):
                file.chmod(permissions)


def is_full(error: OSError) -> bool:
    """Whether a file could not be written because its disk or the user's share of it is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def why_unreadable(file: Path, error: OSError) -> str:
    """What the user can do about a file that is there and cannot be read: it may be good, so never to remove it."""
    if isinstance(error, PermissionError):
        return f"{file}: permission denied: make it readable for this user, as with chmod u+r"
    return f"{file} cannot be read: {error.strerror or error}; try again when its disk can be reached"
