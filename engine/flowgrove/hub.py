"""Folders from the Hugging Face Hub and its local cache. Nothing is ever downloaded, no folder brings a program, and
none has a model built that has no end.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What from_pretrained of transformers takes besides a folder; without the second it would ask on the terminal whether
# to run a program that lies there.
DATA_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_MOST_LAYERS = 10_000


def cached_snapshot(repository: str, kind: str = "model") -> Path | None:
    """The folder of a repository ("model" or "dataset") in the cache;
    None if it was never downloaded, or is no repository's name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, repo_type=kind, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, UnicodeDecodeError):  # the last: a damaged refs/main
        return None


def named_program(folder: Path) -> str | None:
    """The kernel of the Hub, "owner/name", that the configuration of a model of transformers names as its attention;
    None: there is none. With the package `kernels` the library would download and run it.
    """
    found = _first(folder, lambda key, value: key.endswith("_implementation") and "/" in json.dumps(value))
    return None if found is None else str(found[1])


def endless_count(folder: Path) -> str | None:
    """A number of layers or blocks that no model has, in the configuration of a part, as "key value"; None: there is
    none. Libraries would build such a model until the memory is full.
    """

    def is_endless(key: str, value: Any) -> bool:
        counts = value if isinstance(value, list) else [value]
        return any(word in key for word in ("layers", "blocks", "depth")) and any(
            isinstance(count, int | float) and count > _MOST_LAYERS for count in counts
        )

    found = _first(folder, is_endless)
    return None if found is None else f"{found[0]} {json.dumps(found[1])}"


def _first(folder: Path, is_meant: Callable[[str, Any], bool]) -> tuple[str, Any] | None:
    """The first (key, value), at any depth of `folder`/config.json, that is meant."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return next((one for one in _settings(content) if is_meant(*one)), None)
    except (OSError, ValueError, RecursionError):
        return None  # the library says what is wrong


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """All keys of JSON objects, of inner ones after those of the object around them."""
    if isinstance(content, dict):
        yield from content.items()
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _settings(value)
