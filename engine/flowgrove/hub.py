"""The local Hugging Face cache. Nothing is ever downloaded."""

from pathlib import Path


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
