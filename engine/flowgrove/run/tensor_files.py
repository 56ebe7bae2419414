"""The tensor files of a checkpoint: KIND.safetensors (weights, optimizer, ema), or of a run that divides its weights
among ranks KIND/rank_NNNNN.safetensors, each with the sharding header of torch.distributed.checkpoint, whose
HuggingFaceStorageReader reads the folder KIND on any number of ranks.
"""

import json
import math
import os
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, HuggingFaceStorageReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from flowgrove.models.masters import Piece
from flowgrove.run.manifest import DamagedError, tensor_files, unreadable

_AT_ONCE = 1 << 30  # bytes after which no more tensors are read together: files are opened anew for the next


def write_tensors(folder: Path, kind: str, tensors: dict[str, Tensor]) -> str:
    """Writes whole tensors, which are all of their kind; returns the file's name in the checkpoint `folder`."""
    name = f"{kind}.safetensors"
    save_file(tensors, folder / name)
    return name


def write_pieces(folder: Path, kind: str, tensors: dict[str, Tensor], pieces: Mapping[str, Piece], rank: int) -> str:
    """Writes what rank `rank` has of a kind: pieces of the weights named in `pieces`, of their moments and averages,
    and other tensors whole. Returns the file's name in the checkpoint `folder`.
    """
    offsets = {}
    for name, tensor in tensors.items():
        piece, start = piece_of(pieces, name, tensor.ndim), [0] * tensor.ndim
        if piece is not None:
            start[0] = piece.start
        offsets[name] = {"saved_offsets": start}
    (folder / kind).mkdir(exist_ok=True)
    name = f"{kind}/rank_{rank:05d}.safetensors"
    header = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    save_file(tensors, folder / name, header)
    return name


def weight_of(name: str) -> str:
    """The weight that a tensor belongs to: itself, or that of NAME/exp_avg."""
    return name.partition("/")[0]


def piece_of(pieces: Mapping[str, Piece], name: str, dimensions: int) -> Piece | None:
    """Which part of the weight, average or moment of this name a rank has; None: all, as of a count of steps."""
    return pieces.get(weight_of(name)) if dimensions else None


class TensorFiles:
    """The tensors of one kind in a checkpoint that has been verified: their names, shapes and dtypes, and parts of
    them. Raises DamagedError, or UserError where a disk fails.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        files = [name for name in tensor_files(folder) if _is_of(name, kind)]
        if not files:
            raise DamagedError(folder, f"{kind}.safetensors is missing")
        self._reader = HuggingFaceStorageReader(str(folder))
        self._reader.fs = _Files([str(folder / name) for name in files])
        with self._told():
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The whole tensors' shapes, by name."""
        return {name: entry.size for name, entry in self._entries()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By name."""
        return {name: entry.properties.dtype for name, entry in self._entries()}

    def read(self, rows: Mapping[str, slice] | None = None, only: Container[str] | None = None) -> dict[str, Tensor]:
        """All tensors, or `only` these, in host memory: of those named in `rows` these rows of their first dimension,
        the others whole. No more of the files is read than that.
        """
        targets, items = {}, []
        for name, entry in self._entries():
            if only is not None and name not in only:
                continue
            start, sizes = [0] * len(entry.size), list(entry.size)
            if rows is not None and name in rows:
                start[0], sizes[0] = rows[name].start, rows[name].stop - rows[name].start
            targets[name] = torch.empty(sizes, dtype=entry.properties.dtype)
            chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(sizes))
            found = create_read_items_for_chunk_list(name, entry, [chunk]) if targets[name].numel() else []
            if sum(math.prod(item.lengths) for item in found) != targets[name].numel():
                raise DamagedError(
                    self._folder, f"{self._kind}: no file holds all of {name}"
                )  # the reader says nothing
            items += found
        with self._told():
            self._reader.read_data(LoadPlan(items), _Into(targets))
        return targets

    def in_parts(self, order: Iterable[str], rows: Mapping[str, slice] | None = None) -> Mapping[str, Tensor]:
        """The same for who asks for them in this order: some are read at a time, and not kept."""
        return _InParts(self, order, rows)

    def _entries(self) -> Iterator[tuple[str, TensorStorageMetadata]]:
        for name, entry in self._metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                yield name, entry

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unreadable(Path(error.filename or self._folder), self._folder, error) from None
        except (SafetensorError, KeyError, ValueError, TypeError):
            raise DamagedError(self._folder, f"{self._kind}: no whole safetensors file") from None


def holds(folder: Path, kind: str) -> bool:
    """Whether a checkpoint has tensors of this kind."""
    return any(_is_of(name, kind) for name in tensor_files(folder))


def _is_of(name: str, kind: str) -> bool:
    return name == f"{kind}.safetensors" or name.startswith(f"{kind}/")


class _InParts(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for, together with those that come after them in `order`."""

    def __init__(self, files: TensorFiles, order: Iterable[str], rows: Mapping[str, slice] | None) -> None:
        self._files, self._rows = files, rows
        self._parts: dict[str, list[str]] = {}  # what is read with each
        self._read: dict[str, Tensor] = {}
        shapes, dtypes = files.shapes, files.dtypes
        some, held = list[str](), 0
        for name in order:
            if held > _AT_ONCE:
                some, held = [], 0
            some.append(name)
            held += math.prod(shapes[name]) * dtypes[name].itemsize
            self._parts[name] = some

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read = {}  # first, for its memory
            self._read = self._files.read(self._rows, self._parts[name])
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class _Files(FileSystem):
    """Shows DCP's reader, which reads every file of its folder, only these."""

    def __init__(self, files: list[str]) -> None:
        self._files = files

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """The files, whatever the folder."""
        return self._files


class _Into(DefaultLoadPlanner):
    """Lets DCP's reader copy what it reads into `targets`."""

    def __init__(self, targets: dict[str, Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a target that an item fills."""
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._targets[read_item.dest_index.fqn][tuple(slice(start, start + count) for start, count in places)]
