"""Prompts → conditioning: encoders that stay loaded, that wait in the host's memory, or embeddings on disk that let the
encoders go.

On disk each prompt is a safetensors file without padding, in a folder named after the encoders' files and what they
were asked for.
"""

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from flowgrove.data.prompt import encoding_key
from flowgrove.data.prompts import cut_alike
from flowgrove.device import release_memory
from flowgrove.errors import UserError
from flowgrove.files import write_file
from flowgrove.models.adapter import Adapter
from flowgrove.models.conditioning import Conditioning
from flowgrove.recipe.schema import Recipe

_FIRST = 16  # prompts that tell how much room all of them will take
_KEPT_ON_DEVICE, _KEPT_ON_HOST = 1 << 28, 1 << 33  # bytes of embeddings
_LARGE = 1 << 30  # bytes of text encoders that `auto` rather frees
MOST_UNASKED = 20 << 30  # bytes of embeddings that `auto` writes into the user's cache folder
_LENGTH = ".length"
_DIGEST = "sha256"
_MARKS = 8  # tokens that a tokenizer puts around a text, at most
_log = logging.getLogger(__name__)


Encoder = Callable[[list[str]], Conditioning]  # one row per text; where the policy gets its conditioning from


def warn_of_cut_prompts(adapter: Adapter, texts: Iterable[str]) -> None:
    """Logs how many of `texts` differ from others only after what the encoders of `adapter` read."""
    tokenizers = adapter.tokenizers()
    most = max((limit for _, limit in tokenizers), default=0)
    distinct = dict.fromkeys(str(text) for text in texts)
    long = [text for text in distinct if len(text.encode()) + _MARKS > most]  # a token holds a byte or more
    long = [text for text in long if all(len(one(text).input_ids) >= limit for one, limit in tokenizers)]

    def read(text: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(one(text, truncation=True, max_length=limit).input_ids) for one, limit in tokenizers)

    if tokenizers and (told := cut_alike(long, read)) is not None:
        _log.warning("%s", told)


class LoadedEncoder:
    """Asks the adapter's own encoders, once per text while its embeddings are kept.

    One text at a time: an embedding does not depend on its company, so a run that resumes meets the same bits.
    """

    def __init__(self, adapter: Adapter, most: int = _KEPT_ON_DEVICE) -> None:
        self.adapter, self._kept = adapter, _Kept(most)

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        found = self._kept.all_of(texts, lambda missing: [self.adapter.encode([text]) for text in missing])
        for tensor in (tensor for cond in found for tensor in cond.tensors.values() if tensor.is_cuda):
            tensor.record_stream(torch.cuda.current_stream(tensor.device))  # it may be dropped in another thread
        return Conditioning.cat(found)


class OffloadedEncoder:
    """The encoders wait in the host's memory and come to the device only for texts whose
    embeddings are not kept there too.
    """

    def __init__(
        self, load: Callable[[torch.device], Adapter], device: torch.device, most: int = _KEPT_ON_HOST
    ) -> None:
        self.load, self.device, self._kept = load, device, _Kept(most)
        self.adapter: Adapter | None = None

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        return Conditioning.cat(self._kept.all_of(texts, self._encode)).to(self.device)

    def _encode(self, texts: list[str]) -> list[Conditioning]:
        self.adapter = self.adapter or self.load(torch.device("cpu"))
        self.adapter.pipe.to(self.device)
        found = [self.adapter.encode([text]).to(torch.device("cpu")) for text in texts]
        self.adapter.pipe.to("cpu")
        release_memory(self.device)
        return found


class _Kept:
    """Embeddings by text, up to `most` bytes; what was asked for longest ago goes first. Threads ask in turn."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._of: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def all_of(self, texts: list[str], encode: Callable[[list[str]], list[Conditioning]]) -> list[Conditioning]:
        """The embeddings of `texts`; `encode` is asked for those that are not kept."""
        with self._lock:
            return self._all_of(texts, encode)

    def _all_of(self, texts: list[str], encode: Callable[[list[str]], list[Conditioning]]) -> list[Conditioning]:
        missing = [text for text in dict.fromkeys(texts) if text not in self._of]
        if missing:
            for text, cond in zip(missing, encode(missing), strict=True):
                self._of[text] = cond
                self._bytes += cond.nbytes
        found = [self._of[text] for text in texts]
        for text in dict.fromkeys(texts):
            self._of.move_to_end(text)
        while self._bytes > self.most:
            self._bytes -= self._of.popitem(last=False)[1].nbytes
        return found


class StoredEncoder:
    """Reads embeddings from `folder`; `load` brings the encoders for the texts that are not there yet, and they are
    freed again.

    `most`: bytes that the texts of one `prepare` may take; beyond that it raises TooManyPrompts after the first few.
    """

    def __init__(
        self, folder: Path, load: Callable[[torch.device], Adapter], device: torch.device, most: int | None = None
    ) -> None:
        self.folder, self.load, self.device, self.most = folder, load, device, most

    def prepare(self, texts: Iterable[str]) -> None:
        """Encodes what is not on disk yet, with one loading of the encoders."""
        missing = self.missing(texts)
        self.store(missing, missing, warn=True)

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Which of `texts` are not on disk yet, each once."""
        return [text for text in dict.fromkeys(texts) if not self._file(text).exists()]

    def store(self, mine: list[str], missing: list[str], warn: bool) -> None:
        """Encodes those of the `missing` texts that are `mine`; `warn`: says which of them all are cut alike."""
        if not mine:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        adapter = self.load(self.device)
        if warn:
            warn_of_cut_prompts(adapter, missing)
        first = mine[:_FIRST]
        for number, text in enumerate(mine):
            tensors = _without_end(adapter.encode([text]))  # alone: its bits depend on no other text
            try:
                write_file(self._file(text), partial(save_file, tensors, metadata={_DIGEST: _digest(tensors)}))
            except SafetensorError as error:
                ways = "free some space, or name another folder as data.embedding_cache"
                raise UserError(f"cannot write embeddings to {self.folder}: {error}; {ways}") from None
            if number == len(first) - 1:
                self._check_room(first, len(missing))
        del adapter
        release_memory(self.device)

    def __call__(self, texts: list[str]) -> Conditioning:
        """One row per text."""
        self.prepare(texts)
        return Conditioning.cat([self._read(text) for text in texts]).to(self.device)

    def _read(self, text: str) -> Conditioning:
        file = self._file(text)
        try:
            tensors = load_file(file)
            with safe_open(file, "pt") as opened:
                written = (opened.metadata() or {}).get(_DIGEST)
            if written is not None and written != _digest(tensors):  # none in files from before there was one
                raise ValueError("its content is not what was written")
            return _with_end(tensors)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}): remove it, and its prompt is encoded anew") from None

    def _check_room(self, some: list[str], count: int) -> None:
        needed = sum(self._file(text).stat().st_size for text in some) * count // len(some)
        if self.most is not None and needed > self.most:
            raise TooManyPromptsError
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise UserError(
                f"data.embedding_cache: the embeddings of {count:,} prompts take {needed / 1e9:.0f} GB and "
                f"{self.folder} has {free / 1e9:.0f} GB free: "
                "name a folder with more room, or write none"
            )

    def _file(self, text: str) -> Path:
        return self.folder / f"{encoding_key(text)}.safetensors"


class TooManyPromptsError(Exception):
    """More embeddings than `auto` puts into the user's cache folder unasked."""


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + b"\0" + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _without_end(cond: Conditioning) -> dict[str, Tensor]:
    """One prompt's tensors, without padding, for a file;
    zeros that end a sequence are left out, and its length is kept beside it.
    """
    kept = {}
    (alone,) = cond.split()
    for name, tensor in alone.tensors.items():
        kept[name] = tensor.contiguous()
        if tensor.ndim == 3:
            filled = tensor[0].ne(0).any(-1).nonzero()
            kept[name] = tensor[:, : int(filled.max()) + 1 if len(filled) else 0].contiguous()
            kept[f"{name}{_LENGTH}"] = torch.tensor(tensor.shape[1])
    return kept


def _with_end(tensors: dict[str, Tensor]) -> Conditioning:
    whole = {}
    for name, tensor in tensors.items():
        if name.endswith(_LENGTH):
            continue
        length = tensors.get(f"{name}{_LENGTH}")
        whole[name] = tensor if length is None else pad(tensor, (0, 0, 0, int(length) - tensor.shape[1]))
    return Conditioning(whole)


def cache_folder(
    recipe: Recipe, pipeline: Path, parts: tuple[str, ...], prompt_tokens: int, sources: str = ""
) -> Path | None:
    """Where a recipe's embeddings lie: data.embedding_cache, one folder per set of encoders (`parts`), and for prompts
    with `sources` per size; None where the encoders stay loaded.

    `auto`: in the user's cache folder if the encoders' files hold more than a gigabyte.
    """
    wanted = recipe.data.embedding_cache
    files = sorted(file for part in parts for file in (pipeline / part).rglob("*") if file.is_file())
    sizes = [file.stat() for file in files]
    if wanted == "none" or (wanted == "auto" and sum(stat.st_size for stat in sizes) <= _LARGE):
        return None
    root = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flowgrove" / "embeddings"
        if wanted == "auto"
        else Path(wanted)
    )
    identity = [
        "2",
        recipe.model.adapter,
        recipe.model.dtype,
        str(prompt_tokens),
        diffusers.__version__,
        transformers.__version__,
    ]
    # Wan's pipeline cleans prompts with it where it is installed
    identity.append(f"ftfy {find_spec('ftfy') is not None}")
    if sources:  # their latents are of the size that is drawn
        model = recipe.model
        identity.append(f"{sources} {model.height} {model.width} {model.frames} {model.vae_tiling}")
    identity += [f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in zip(files, sizes, strict=True)]
    return root.expanduser() / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
