"""A prompt that is more than its text: source pictures, a video, a negative prompt, and what else its row says.

To all that reads texts it is its text. Rows that have nothing else are plain strings.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from flowgrove.data.sources import Picture, Video


class Prompt(str):
    """A text with what its row holds beside it. Two are equal if all of it is.

    `pictures`: those that are edited or animated, in order; `video`: the one that is edited or followed; `mask`: of
    its frames, white where they are drawn anew, None: everywhere; `negative`: what guidance leads away from, None: what
    the recipe says; `metadata`: other columns by their names, JSON values.
    """

    pictures: tuple[Picture, ...]
    video: Video | None
    mask: Video | None
    negative: str | None
    metadata: Mapping[str, Any]

    def __new__(
        cls,
        text: str,
        pictures: tuple[Picture, ...] = (),
        negative: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        video: Video | None = None,
        mask: Video | None = None,
    ) -> "Prompt":
        self = super().__new__(cls, text)
        self.pictures, self.negative, self.metadata = pictures, negative, metadata or {}
        self.video, self.mask = video, mask
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.pictures, self.negative, dict(self.metadata), self.video, self.mask)

    def __str__(self) -> str:
        return self[:]  # a plain string

    @cached_property
    def _row(self) -> tuple[Any, ...]:
        """All of it, or nothing where there is but a text."""
        if not (self.pictures or self.metadata or self.video or self.mask) and self.negative is None:
            return ()
        sources = tuple(_identities(self))
        return sources, self.negative, json.dumps(dict(self.metadata), sort_keys=True, default=str)

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


def video_of(prompt: str) -> Video | None:
    """The source video of a prompt."""
    return prompt.video if isinstance(prompt, Prompt) else None


def mask_of(prompt: str) -> Video | None:
    """The mask of a prompt's source video."""
    return prompt.mask if isinstance(prompt, Prompt) else None


def _identities(prompt: str) -> list[str]:
    """What tells the sources of a prompt apart."""
    pictures = [picture.identity for picture in pictures_of(prompt)]
    videos = (("video", video_of(prompt)), ("mask", mask_of(prompt)))
    return pictures + [f"{kind} {video.identity}" for kind, video in videos if video is not None]


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
    return Prompt(text, prompt.pictures, prompt.negative, prompt.metadata, prompt.video, prompt.mask)


def conditional(prompt: str) -> str:
    """What is encoded of a prompt: its text and its sources."""
    pictures, video, mask = pictures_of(prompt), video_of(prompt), mask_of(prompt)
    return Prompt(str(prompt), pictures, video=video, mask=mask) if pictures or video or mask else str(prompt)


def unconditional(prompt: str, default: str) -> str:
    """What is encoded beside it for guidance: its negative prompt, or `default`, with the same sources."""
    negative = prompt.negative if isinstance(prompt, Prompt) else None
    return conditional(with_text(prompt, default if negative is None else negative))


def encoding_key(prompt: str) -> str:
    """A hash of what `conditional` leaves, which names its embeddings in a folder."""
    content = "\0".join([str(prompt), *_identities(prompt)])
    return hashlib.sha256(content.encode()).hexdigest()


def described(prompt: str) -> str | dict[str, Any]:
    """A prompt as JSON, wherever its files lie; what is but a text is itself."""
    if not isinstance(prompt, Prompt) or prompt == str(prompt):
        return str(prompt)
    pictures = [picture.described for picture in prompt.pictures]
    videos = {"video": prompt.video, "mask": prompt.mask}
    told = {name: video.described for name, video in videos.items() if video is not None}
    row = {"prompt": str(prompt), "images": pictures, **told, "negative": prompt.negative}
    return {**row, "metadata": json_metadata(prompt)}
