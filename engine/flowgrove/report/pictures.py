"""The sample grids of a run as pictures inside a page: so many and so large that the page stays small."""

import base64
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrove.report.grids import Grid, grid_files, load_grid, rows_in_common
from flowgrove.report.series import rounded, spread

MOST_GRIDS = 24
MOST_BYTES = 4_000_000  # of all pictures of a run; base64 adds a third
_SIDES = (256, 192, 160, 128, 96, 64, 48)  # of a tile, in pixels
_EXACT = 64  # up to this side a tile is kept to the bit, if that fits

Loaded = TypeVar("Loaded")
Address = Callable[[int, bytes, str], str]  # (iterations, picture, its kind) → what a browser finds it under


def data_uri(done: int, picture: bytes, kind: str) -> str:
    """The picture itself as its address."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


class _Shown(NamedTuple):
    """A grid as a page shows it; `grid` has the sizes of its tiles and not their colours."""

    grid: Grid
    picture: bytes
    kind: str


def pictures_of(folder: Path, address: Address = data_uri, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """`grids`: the first and the last of a run and some in between, each one picture of all tiles, those of `sources`
    first in each row, with prompts and scores; `common`: pairs of rows of the first and the last that show the same
    prompts and seeds; `changed`: whether these two have other prompts.
    """
    files = grid_files(folder)

    def load(done: int) -> _Shown:
        told = files[done].stat()
        return _shown(files[done], (told.st_mtime_ns, told.st_size), most_bytes // min(len(files), MOST_GRIDS))

    found = _chosen(list(files), MOST_GRIDS, load)
    shown = []
    for done, (grid, picture, kind) in found:
        rows, columns, height, width = grid.tiles.shape[:4]
        shown.append({
            "done": done, "rows": rows, "columns": columns, "width": width, "height": height,
            "sources": 0 if grid.sources is None else grid.sources.shape[1],
            "src": address(done, picture, kind), "prompts": grid.prompts,
            "scores": [[rounded(score) if np.isfinite(score) else None for score in row] for row in grid.scores],
        })  # fmt: skip
    if len(found) < 2:
        return {"grids": shown, "common": [], "changed": False}
    first, last = found[0][1].grid, found[-1][1].grid
    return {"grids": shown, "common": rows_in_common(first, last), "changed": first.prompts != last.prompts}


def chosen_grids(folder: Path, most: int = MOST_GRIDS) -> list[tuple[int, Grid]]:
    """(iterations, grid) of at most `most` evaluations, with the first and the last; pictures of another kind are
    passed over.
    """
    files = grid_files(folder)
    return _chosen(list(files), most, lambda done: load_grid(files[done]))


def _chosen(numbers: list[int], most: int, load: Callable[[int], Loaded]) -> list[tuple[int, Loaded]]:
    """The first and the last that load, and some in between; others raise ValueError, or have gone meanwhile."""

    def first_of(some: Iterable[int]) -> list[tuple[int, Loaded]]:
        for done in some:
            with suppress(ValueError, FileNotFoundError):
                return [(done, load(done))]
        return []

    start, end = first_of(numbers), first_of(reversed(numbers))
    if not start or start[0][0] == end[0][0]:
        return start
    between = [done for done in numbers if start[0][0] < done < end[0][0]]
    chosen = [between[place - 1] for place in spread(len(between) + 2, most)[1:-1]]
    return [*start, *(one for done in chosen for one in first_of([done])), *end]


@lru_cache(maxsize=256)
def _shown(file: Path, stamp: tuple[int, int], most_bytes: int) -> _Shown:
    """Whoever watches a run asks for the same grids again and again; `stamp` tells whether a file is the same."""
    grid = load_grid(file)
    picture, kind = encoded(grid.whole, most_bytes)
    blank, *sources = (
        np.broadcast_to(np.uint8(0), some.shape) for some in (grid.tiles, grid.sources) if some is not None
    )
    return _Shown(replace(grid, tiles=blank, sources=sources[0] if sources else None), picture, kind)


def encoded(tiles: NDArray[np.uint8], most_bytes: int) -> tuple[bytes, str]:
    """All tiles [rows, columns, H, W, 3] as one picture and its kind: the largest and the truest that needs at most
    `most_bytes`, or the smallest there is.
    """
    longest = max(tiles.shape[2:4])
    picture, kind = b"", "jpeg"
    if longest <= _EXACT and len(picture := _saved(_mosaic(tiles, longest), "png")) <= most_bytes:
        return picture, "png"
    for side in (longest, *(side for side in _SIDES if side < longest)):
        if side <= _SIDES[0]:
            picture = _saved(_mosaic(tiles, side), "jpeg")
            if len(picture) <= most_bytes:
                break
    return picture, kind


def _mosaic(tiles: NDArray[np.uint8], side: int) -> Image.Image:
    """The tiles, with a longest side of `side` pixels, in rows and columns."""
    rows, columns, height, width = tiles.shape[:4]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    whole = Image.new("RGB", (columns * size[0], rows * size[1]))
    for row in range(rows):
        for column in range(columns):
            tile = Image.fromarray(tiles[row, column])
            whole.paste(tile if scale == 1 else tile.resize(size, Image.Resampling.LANCZOS),
                        (column * size[0], row * size[1]))  # fmt: skip
    return whole


def _saved(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    settings = {"quality": 82, "subsampling": 0} if kind == "jpeg" else {}  # colours do not run into the next tile
    picture.save(file, kind, **settings)
    return file.getvalue()
