"""The sample grids of a run as pictures inside a page: so many and so large that the page stays small."""

import base64
import io
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrove.report.grids import Grid, grid_files, load_grid, rows_in_common
from flowgrove.report.series import rounded, spread

MOST_GRIDS = 24
MOST_BYTES = 4_000_000  # of all pictures of a run; base64 adds a third
_SIDES = (256, 192, 160, 128, 96, 64, 48)  # of a tile, in pixels
_EXACT = 64  # up to this side a tile is kept to the bit, if that fits

Address = Callable[[int, bytes, str], str]  # (iterations, picture, its kind) → what a browser finds it under


def data_uri(done: int, picture: bytes, kind: str) -> str:
    """The picture itself as its address."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def pictures_of(folder: Path, address: Address = data_uri, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """`grids`: the first and the last of a run and some in between, each one picture of all tiles, with prompts and
    scores; `common`: pairs of rows of the first and the last that show the same prompts and seeds; `changed`: whether
    these two have other prompts.
    """
    grids = chosen_grids(folder)
    shown = []
    for done, grid in grids:
        picture, kind = encoded(grid.tiles, most_bytes // len(grids))
        rows, columns, height, width = grid.tiles.shape[:4]
        shown.append({
            "done": done, "rows": rows, "columns": columns, "width": width, "height": height,
            "src": address(done, picture, kind), "prompts": grid.prompts,
            "scores": [[rounded(score) if np.isfinite(score) else None for score in row] for row in grid.scores],
        })  # fmt: skip
    if len(grids) < 2:
        return {"grids": shown, "common": [], "changed": False}
    first, last = grids[0][1], grids[-1][1]
    return {"grids": shown, "common": rows_in_common(first, last), "changed": first.prompts != last.prompts}


def chosen_grids(folder: Path, most: int = MOST_GRIDS) -> list[tuple[int, Grid]]:
    """(iterations, grid) of at most `most` evaluations, with the first and the last; pictures of another kind are
    passed over.
    """
    files = grid_files(folder)

    def first_of(numbers: Iterable[int]) -> list[tuple[int, Grid]]:
        for done in numbers:
            with suppress(ValueError):
                return [(done, load_grid(files[done]))]
        return []

    start, end = first_of(files), first_of(reversed(files))
    if not start or start[0][0] == end[0][0]:
        return start
    between = [done for done in files if start[0][0] < done < end[0][0]]
    chosen = [between[place - 1] for place in spread(len(between) + 2, most)[1:-1]]
    return [*start, *(grid for done in chosen for grid in first_of([done])), *end]


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
