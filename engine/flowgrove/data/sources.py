"""Source pictures and videos of prompts, in files or in the bytes of files."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

from flowgrove.errors import UserError, one_line

_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")  # that Pillow reads, frame by frame


@dataclass(frozen=True)
class Source:
    """A file, a folder of pictures, or the bytes of a file. `name`: as its row names it, or the SHA-256 of the bytes;
    `place`: how errors call it.
    """

    name: str
    place: str
    path: Path | None = None
    content: bytes | None = None

    @property
    def files(self) -> list[Path]:
        """Those it lies in, of a folder its pictures, by name: numbers in names count as numbers."""
        if self.path is None:
            return []
        if not self.path.is_dir():
            return [self.path]
        endings = Image.registered_extensions()
        found = (file for file in self.path.iterdir() if file.suffix.lower() in endings and file.is_file())
        return sorted((file for file in found if not file.name.startswith(".")), key=lambda file: _by_number(file.name))

    @cached_property
    def identity(self) -> str:
        """Tells sources apart: files by their paths, sizes and times, bytes by their hash."""
        if self.path is None:
            return self.name
        found = [(file, file.stat()) for file in self.files]
        return "\n".join(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}" for file, stat in found)

    @property
    def described(self) -> str:
        """Its name, and of files how long they are, wherever they lie: others under the same name rarely are as
        long.
        """
        return " ".join([self.name, *(str(file.stat().st_size) for file in self.files)])

    @property
    def _opened(self) -> io.BytesIO | str:
        return io.BytesIO(self.content) if self.content is not None else str(self.path or "")


@dataclass(frozen=True)
class Picture(Source):
    """A source picture."""

    def load(self) -> Image.Image:
        """The picture in RGB, upright, on white where it is transparent. Raises UserError for what is no picture, or
        has more than 8 bits per colour.
        """
        try:
            with Image.open(self._opened) as opened:
                return _rgb(opened)
        except FileNotFoundError:
            raise UserError(f"{self.place} is gone: put the picture back") from None
        except Exception as error:  # what decoders raise over damaged files has many types
            reason = one_line(str(error), 200) or type(error).__name__
            what = f"{self.place} is no picture that can be read ({reason})"
            raise UserError(f"{what}: save it anew as PNG of 8 bits per colour") from None


@dataclass(frozen=True)
class Video(Source):
    """A source video: a file, or a folder of pictures that are its frames. `frames`: how many the model reads, from
    its beginning.
    """

    frames: int = 1

    def each(self) -> Iterator[Image.Image]:
        """Its first frames one by one, as `Picture.load` has pictures. Raises UserError for what is no video, or is
        shorter.
        """
        count = 0
        try:
            for frame in islice(self._frames(), self.frames):
                yield frame
                count += 1
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.place} is gone: put the video back") from None
        except Exception as error:  # what decoders raise over damaged files has many types
            reason = one_line(str(error), 200) or type(error).__name__
            raise UserError(f"{self.place} is no video that can be read ({reason}): save it anew as MP4") from None
        if count < self.frames:
            what = f"{self.place} has {count} frame{'' if count == 1 else 's'}, and model.frames is {self.frames}"
            fix = "give a video that is as long, if need be a folder of equal pictures, or lower model.frames"
            raise UserError(f"{what}: {fix}")

    def load(self) -> list[Image.Image]:
        """All that `each` gives."""
        return list(self.each())

    @property
    def middle(self) -> Image.Image:
        """The frame that stands for it where a result's middle frame stands for the result."""
        return next(islice(self.each(), self.frames // 2, None))

    def _frames(self) -> Iterator[Image.Image]:
        if self.path is not None and self.path.is_dir():
            for file in self.files:
                yield Picture(file.name, f"{file.name} in {self.place}", file).load()
            return
        try:
            Image.init()  # not every Pillow has all
            with Image.open(self._opened, formats=[name for name in _ANIMATIONS if name in Image.OPEN]) as opened:
                for frame in ImageSequence.Iterator(opened):
                    yield _rgb(frame)
        except UnidentifiedImageError:
            yield from self._decoded()

    def _decoded(self) -> Iterator[Image.Image]:
        try:
            import av
        except ImportError:
            raise UserError("reading videos needs PyAV: pip install av") from None
        with av.open(self._opened) as file:
            if not file.streams.video:
                raise ValueError("it holds no video")
            for frame in file.decode(video=0):
                yield frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)


def _by_number(name: str) -> list[tuple[int, str]]:
    """What sorts names with 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _rgb(opened: Image.Image) -> Image.Image:
    """A picture upright, on white where it is transparent."""
    if opened.mode.startswith(("I", "F")):
        raise ValueError(f"it has {opened.mode} pixels, of more than 8 bits")
    upright = ImageOps.exif_transpose(opened)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
