"""The one rule for paths that a user writes, and reading files that may be anything.

`~` is the home folder, and an absolute path is itself. A relative path in a recipe is sought beside the recipe that
says it, then beside the one that was given, then in the working folder; one of `--set` as if the given recipe said it.
What a run writes (run.out, data.embedding_cache) and options of a command line are relative to the working folder.
"""

import os
import stat
from pathlib import Path

from flowgrove.errors import UserError


def local(text: str | Path, key: str) -> Path:
    """`text` as a path with `~` expanded. Raises UserError naming `key` for what can be no path."""
    written = str(text)
    try:
        os.fsencode(written)
        if "\0" in written:
            raise ValueError("it holds a NUL character")
        return Path(written).expanduser()
    except (ValueError, RuntimeError) as error:  # RuntimeError: a home folder that nobody has
        reason = "it holds half a character" if isinstance(error, UnicodeError) else str(error)
        what = f"{written!r} is no path ({reason})"
        raise UserError(f"{key}: {what}: write the path of a file or folder") from None


def exists(path: Path) -> bool:
    """Whether there is something; never an error (names too long, loops of links, folders that are closed)."""
    return os.path.exists(path)


def find(text: str, folder: Path, key: str) -> str | None:
    """The absolute path of what `text` means beside `folder`, if it is there. Raises UserError naming `key`."""
    path = folder / local(text, key)
    return os.path.realpath(path) if exists(path) else None


def check_regular(path: Path, what: str) -> int:
    """Its size, or that of a folder, which has errors of its own.
    Raises OSError, and UserError for pipes and devices.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{what} {path} is a pipe or a device: write it into a file and give that")
    return found.st_size


def read_bytes(path: Path, most: int, what: str) -> bytes:
    """The content of a regular file of at most `most` bytes: a pipe or a device could be read for ever.

    Raises OSError, and UserError beginning with `what`.
    """
    size = check_regular(path, what)
    with path.open("rb") as file:
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise UserError(f"{what} {path} is larger than {most >> 10:,} KiB: give the right file, or split it")
    return content
