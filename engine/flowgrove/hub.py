"""The local Hugging Face cache. Nothing is ever downloaded, and no folder brings a program."""

import json
from pathlib import Path
from typing import Any

# What from_pretrained of transformers takes besides a folder; without the second it would ask on the terminal whether
# to run a program that lies there.
DATA_ONLY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


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

    def named(content: Any) -> str | None:
        if isinstance(content, list):
            return next(filter(None, map(named, content)), None)
        if not isinstance(content, dict):
            return None
        for key, value in content.items():
            if key.endswith("_implementation") and "/" in json.dumps(value):
                return str(value)
        return next(filter(None, map(named, content.values())), None)

    try:
        return named(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None  # the library says what is wrong
