"""What is read of a row of prompts beside its text: source pictures, a video, a negative prompt, metadata."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowgrove.data.prompt import Prompt
from flowgrove.data.sources import Picture, Video
from flowgrove.errors import UserError, one_line
from flowgrove.paths import check_regular, local

_PICTURES = ("images", "image")  # the first that a file has
_VIDEO, _MASK, _NEGATIVE = "video", "mask", "negative_prompt"
_MOST_BYTES = 4 << 30  # of pictures and videos that stand in a file of prompts themselves
_Place = tuple[str, str, Path | None, bytes | None]  # name, place, path and content of a Source


@dataclass(frozen=True)
class Columns:
    """The columns that a recipe wants beside the text. `pictures`: whether its model takes some; `frames`: as many as
    it takes of a video, 0: it takes none; `metadata`: names (data.metadata), or all that have no other use.
    """

    pictures: bool = False
    frames: int = 0
    metadata: tuple[str, ...] | Literal["all"] = ()

    def of(self, names: Iterable[str], text: str, file: Path, key: str, room: "Room | None" = None) -> "Chosen | None":
        """What a file with the columns `names`, whose texts are in the column `text`, has of them; None if nothing.
        `room`: for the sources in all files of a set. Raises UserError for metadata that it has not.
        """
        known = [name for name in dict.fromkeys(names) if name != text]
        pictures = next((name for name in _PICTURES if self.pictures and name in known), None)
        video, mask = (name if self.frames and name in known else None for name in (_VIDEO, _MASK))
        negative = _NEGATIVE if _NEGATIVE in known else None
        if self.metadata == "all":
            metadata = [name for name in known if name not in (*_PICTURES, _NEGATIVE, video, mask)]
        else:
            metadata = list(self.metadata)
            if missing := [name for name in metadata if name not in known]:
                there = f"one of {', '.join(known)}" if known else "null, since it has no other column"
                raise UserError(f"data.metadata: {file} has no column {missing[0]}, for {key}: write {there}")
        found = Chosen(pictures, video, mask, negative, tuple(metadata), file, key, room or Room(), self.frames)
        return found if found.names else None


@dataclass
class Room:
    """The bytes of sources that stand in files of prompts."""

    used: int = 0


@dataclass
class Chosen:
    """The columns of one file."""

    pictures: str | None
    video: str | None
    mask: str | None
    negative: str | None
    metadata: tuple[str, ...]
    file: Path
    key: str
    room: Room
    frames: int

    @property
    def names(self) -> list[str]:
        """All of them."""
        columns = (self.pictures, self.video, self.mask, self.negative, *self.metadata)
        return [name for name in columns if name is not None]

    def prompt(self, text: str, row: Mapping[str, Any], number: int) -> Prompt:
        """The prompt of row `number`. Raises UserError for a source that is not there."""
        negative = None if self.negative is None else row.get(self.negative)
        if negative is not None and not _is_text(negative):
            what = f"row {number} of {self.file} has the negative_prompt {one_line(repr(negative), 40)}"
            raise UserError(f"{self.key}: {what}: write a text, or null")
        pictures = () if self.pictures is None else _listed(row.get(self.pictures))
        taken = tuple(Picture(*self._place(each, number, "picture", self.pictures)) for each in pictures)
        video, mask = (self._video(column, row, number) for column in (self.video, self.mask))
        return Prompt(text, taken, negative, {name: row.get(name) for name in self.metadata}, video, mask)

    def _video(self, column: str | None, row: Mapping[str, Any], number: int) -> Video | None:
        value = None if column is None else row.get(column)
        return None if value in (None, "") else Video(*self._place(value, number, "video", column), frames=self.frames)

    def _place(self, value: Any, number: int, kind: Literal["picture", "video"], column: str | None) -> _Place:
        """Where a source lies: of a path or bytes, or of an object with one of both as `datasets` has it."""
        path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
        if isinstance(path, bytes):
            path, content = None, path
        if isinstance(content, bytes):
            return self._inside(content, number, kind)
        if isinstance(path, str) and path:
            found = self._file(path, number, kind)
            return path, f"{found}, the {kind} in row {number} of {self.file},", found, None
        what = f"row {number} of {self.file} has {one_line(str(value), 40)} in the column {column}"
        raise UserError(f"{self.key}: {what}: write the path of a {kind}{', or a list of paths' * (kind == 'picture')}")

    def _file(self, name: str, number: int, kind: str) -> Path:
        folder = self.file if self.file.is_dir() else self.file.parent
        path = folder / local(name, f"{self.key}: row {number} of {self.file}")
        try:
            if not (kind == "video" and path.is_dir()):  # its frames are pictures in a folder
                check_regular(path, f"{self.key}: row {number} of {self.file} names a {kind}, and")
                if path.is_dir():
                    raise IsADirectoryError(21, "it is a folder")
        except OSError as error:
            what = f"row {number} of {self.file} names the {kind} {path}, which cannot be read ({error.strerror})"
            raise UserError(f"{self.key}: {what}: correct the path, which is relative to the file") from None
        return path

    def _inside(self, content: bytes, number: int, kind: str) -> _Place:
        self.room.used += len(content)
        if self.room.used > _MOST_BYTES:
            what = f"{self.file} holds more than {_MOST_BYTES >> 30} GiB of {kind}s, which would stay in memory"
            raise UserError(f"{self.key}: {what}: save them as files and write their paths in the column")
        return hashlib.sha256(content).hexdigest(), f"the {kind} in row {number} of {self.file}", None, content


def _listed(value: Any) -> list[Any]:
    """One value, or several."""
    return list(value) if isinstance(value, list | tuple) else [] if value in (None, "") else [value]


def _is_text(value: Any) -> bool:
    """Whether a value is a text without half a character (a lone surrogate)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_columns(
    texts: Iterable[str | None], rows: Iterable[Mapping[str, Any]], chosen: Chosen, first: int
) -> list[str]:
    """Prompts of the rows from number `first` on whose text is not null."""
    pairs = enumerate(zip(texts, rows, strict=True), first)
    return [chosen.prompt(text, row, number) for number, (text, row) in pairs if text is not None]
