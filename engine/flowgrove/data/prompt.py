"""A prompt that is more than its text: source pictures, a negative prompt, and what else its row says.

To all that reads texts it is its text. Rows that have nothing else are plain strings.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from flowgrove.errors import UserError, one_line


@dataclass(frozen=True)
class Picture:
    """A source picture, in a file or in the bytes of one. `name`: as its row names it, or the SHA-256 of the bytes;
    `place`: how errors call it.
    """

    name: str
    place: str
    path: Path | None = None
    content: bytes | None = None

    @cached_property
    def identity(self) -> str:
        """Tells pictures apart: a file by its path, size and time, bytes by their hash."""
        if self.path is None:
            return self.name
        found = self.path.stat()
        return f"{self.path.resolve()} {found.st_size} {found.st_mtime_ns}"

    @property
    def described(self) -> str:
        """Its name, and of a file how long it is, wherever it lies: another under the same name is rarely as long."""
        return self.name if self.path is None else f"{self.name} {self.path.stat().st_size}"

    def load(self) -> Image.Image:
        """The picture in RGB, upright, on white where it is transparent. Raises UserError for what is no picture, or
        has more than 8 bits per colour.
        """
        try:
            with Image.open(io.BytesIO(self.content) if self.content is not None else self.path or "") as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(f"it has {opened.mode} pixels, of more than 8 bits")
                upright = ImageOps.exif_transpose(opened)
                if not upright.has_transparency_data:
                    return upright.convert("RGB")
                layer = upright.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        except FileNotFoundError:
            raise UserError(f"{self.place} is gone: put the picture back") from None
        except Exception as error:  # what decoders raise over damaged files has many types
            reason = one_line(str(error), 200) or type(error).__name__
            what = f"{self.place} is no picture that can be read ({reason})"
            raise UserError(f"{what}: save it anew as PNG of 8 bits per colour") from None


class Prompt(str):
    """A text with what its row holds beside it. Two are equal if all of it is.

    `pictures`: those that are edited or animated, in order; `negative`: what guidance leads away from, None: what the
    recipe says; `metadata`: other columns by their names, JSON values.
    """

    pictures: tuple[Picture, ...]
    negative: str | None
    metadata: Mapping[str, Any]

    def __new__(
        cls,
        text: str,
        pictures: tuple[Picture, ...] = (),
        negative: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Prompt":
        self = super().__new__(cls, text)
        self.pictures, self.negative, self.metadata = pictures, negative, metadata or {}
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.pictures, self.negative, dict(self.metadata))

    def __str__(self) -> str:
        return self[:]  # a plain string

    @cached_property
    def _row(self) -> tuple[Any, ...]:
        """All of it, or nothing where there is but a text."""
        if not (self.pictures or self.metadata) and self.negative is None:
            return ()
        pictures = tuple(picture.identity for picture in self.pictures)
        return pictures, self.negative, json.dumps(dict(self.metadata), sort_keys=True, default=str)

    def __eq__(self, other: object) -> bool:
        row = other._row if isinstance(other, Prompt) else ()
        return bool(str.__eq__(self, other) is True and self._row == row)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((self[:], self._row)) if self._row else str.__hash__(self)


def pictures_of(prompt: str) -> tuple[Picture, ...]:
    """The source pictures of a prompt."""
    return prompt.pictures if isinstance(prompt, Prompt) else ()


def metadata_of(prompt: str) -> Mapping[str, Any]:
    """The other columns of a prompt's row (data.metadata)."""
    return prompt.metadata if isinstance(prompt, Prompt) else {}


def json_metadata(prompt: str) -> dict[str, Any]:
    """The same as JSON has it; what JSON has not is its text."""
    found: dict[str, Any] = json.loads(json.dumps(dict(metadata_of(prompt)), default=str))
    return found


def with_text(prompt: str, text: str) -> str:
    """The same row with another text."""
    if not isinstance(prompt, Prompt):
        return text
    return Prompt(text, prompt.pictures, prompt.negative, prompt.metadata)


def conditional(prompt: str) -> str:
    """What is encoded of a prompt: its text and its pictures."""
    pictures = pictures_of(prompt)
    return Prompt(str(prompt), pictures) if pictures else str(prompt)


def unconditional(prompt: str, default: str) -> str:
    """What is encoded beside it for guidance: its negative prompt, or `default`, with the same pictures."""
    negative = prompt.negative if isinstance(prompt, Prompt) else None
    return conditional(with_text(prompt, default if negative is None else negative))


def encoding_key(prompt: str) -> str:
    """A hash of what `conditional` leaves, which names its embeddings in a folder."""
    content = "\0".join([str(prompt), *(picture.identity for picture in pictures_of(prompt))])
    return hashlib.sha256(content.encode()).hexdigest()


def described(prompt: str) -> str | dict[str, Any]:
    """A prompt as JSON, wherever its files lie; what is but a text is itself."""
    if not isinstance(prompt, Prompt) or prompt == str(prompt):
        return str(prompt)
    pictures = [picture.described for picture in prompt.pictures]
    row = {"prompt": str(prompt), "images": pictures, "negative": prompt.negative}
    return {**row, "metadata": json_metadata(prompt)}
