"""Prompts → conditioning: encoders that stay loaded, or embeddings on disk that let the encoders go.

On disk each prompt is a safetensors file without padding, in a folder named after the encoders' files and what they were asked for.
"""

import gc
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from flowgrove.files import write_file
from flowgrove.models.adapter import Adapter
from flowgrove.models.conditioning import Conditioning
from flowgrove.recipe import Recipe

_AT_ONCE = 16  # prompts per pass of the encoders
_LARGE = 1 << 30  # bytes of text encoders that `auto` rather frees


class Encoder(Protocol):
    """Where the policy gets its conditioning from."""

    def prepare(self, texts: Iterable[str]) -> None:
        """Announces texts that will be asked for."""
        ...

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        ...


class LoadedEncoder:
    """Asks the adapter's own encoders every time."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def prepare(self, texts: Iterable[str]) -> None:
        """Nothing to prepare."""

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        return Conditioning.cat([self.adapter.encode(texts[i : i + _AT_ONCE]) for i in range(0, len(texts), _AT_ONCE)])


class StoredEncoder:
    """Reads embeddings from `folder`; `load` brings the encoders for the texts that are not there yet, and they are freed again."""

    def __init__(self, folder: Path, load: Callable[[], Adapter], device: torch.device) -> None:
        self.folder, self.load, self.device = folder, load, device

    def prepare(self, texts: Iterable[str]) -> None:
        """Encodes what is not on disk yet, with one loading of the encoders."""
        missing = [text for text in dict.fromkeys(texts) if not self._file(text).exists()]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        adapter = self.load()
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            for text, cond in zip(some, adapter.encode(some).split(), strict=True):
                tensors = {name: tensor.contiguous() for name, tensor in cond.tensors.items()}
                write_file(self._file(text), lambda partial, tensors=tensors: save_file(tensors, partial))  # type: ignore[misc]
        del adapter
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        self.prepare(texts)
        return Conditioning.cat([Conditioning(load_file(self._file(text), device=str(self.device))) for text in texts])

    def _file(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"


def cache_folder(recipe: Recipe, pipeline: Path, parts: tuple[str, ...], prompt_tokens: int) -> Path | None:
    """Where a recipe's embeddings lie: data.embedding_cache, one folder per set of encoders; None where the encoders stay loaded.

    `auto`: in the user's cache folder if the encoders' files hold more than a gigabyte.
    """
    wanted = recipe.data.embedding_cache
    files = sorted(file for part in parts for file in (pipeline / part).rglob("*") if file.is_file())
    sizes = [file.stat() for file in files]
    if wanted == "none" or (wanted == "auto" and sum(stat.st_size for stat in sizes) <= _LARGE):
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flowgrove" / "embeddings" if wanted == "auto" else Path(wanted)
    identity = [recipe.model.adapter, recipe.model.dtype, str(prompt_tokens)]
    identity += [f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in zip(files, sizes, strict=True)]
    return root.expanduser() / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
