"""Sample grids: one PNG per evaluation, a row per prompt, with prompts and scores inside the file, so that a report can
set two of them side by side.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowgrove.data.prompt import video_of
from flowgrove.errors import UserError
from flowgrove.evaluation import Evaluated
from flowgrove.models.sources import fitted, source_pictures
from flowgrove.report.mosaics import files_of_iterations, load_mosaic, save_mosaic
from flowgrove.rewards.pixels import to_bytes

_log = logging.getLogger(__name__)
_MOST_PROMPTS, _MOST_SAMPLES = 8, 4


@dataclass(frozen=True)
class Grid:
    """tiles uint8 [prompts, samples, H, W, 3]; scores [prompts, samples], weighted sums, NaN where nothing was scored;
    `numbers` of the prompts among those that were drawn, which name their noise (none: not known); `sources`: the
    prompts' own pictures and the middle frames of their videos, uint8 [prompts, pictures, H, W, 3], where they have
    some.
    """

    tiles: NDArray[np.uint8]
    prompts: list[str]
    scores: NDArray[np.float64]
    numbers: tuple[int, ...] = ()
    sources: NDArray[np.uint8] | None = None

    @property
    def whole(self) -> NDArray[np.uint8]:
        """Sources and samples beside each other, [prompts, sources + samples, H, W, 3]."""
        return self.tiles if self.sources is None else np.concatenate([self.sources, self.tiles], axis=1)

    def part(self, rows: list[int], columns: int) -> "Grid":
        """Some of its rows, and the first `columns` samples of each."""
        numbers = tuple(self.numbers[row] for row in rows) if self.numbers else ()
        prompts = [self.prompts[row] for row in rows]
        sources = None if self.sources is None else self.sources[rows]
        return Grid(self.tiles[rows, :columns], prompts, self.scores[rows, :columns], numbers, sources)

    def rows(self) -> dict[tuple[int, str], int]:
        """(number, prompt) → row."""
        return {key: row for row, key in enumerate(zip(self.numbers, self.prompts, strict=True))}


def rows_in_common(first: Grid, second: Grid) -> list[tuple[int, int]]:
    """Pairs of rows of two grids that show the same prompt and seeds in pictures of one size."""
    if first.tiles.shape[2:] != second.tiles.shape[2:]:
        return []
    if first.numbers and second.numbers:
        others = second.rows()
        return [(row, others[key]) for key, row in first.rows().items() if key in others]
    # one is from before numbers were kept: only rows of unchanged lists are sure to match
    return [(row, row) for row in range(len(first.prompts))] if first.prompts == second.prompts else []


def in_common(first: Grid, second: Grid) -> tuple[Grid, Grid] | None:
    """What two grids show of the same prompts and seeds; None if there is nothing."""
    same = rows_in_common(first, second)
    if not same:
        return None
    columns = min(first.tiles.shape[1], second.tiles.shape[1])
    return first.part([row for row, _ in same], columns), second.part([row for _, row in same], columns)


def grid_files(run: Path) -> dict[int, Path]:
    """The grids of a run by the iterations that their model had behind it, in that order."""
    return files_of_iterations(run / "samples", ".png")


def save_grid(path: Path, evaluated: Evaluated, samples: int, weights: list[float]) -> Grid:
    """Writes the first prompts of an evaluation, spread over the list, as a PNG, and returns them."""
    count = len(evaluated.prompts) // samples
    chosen = np.unique(np.linspace(0, count - 1, min(_MOST_PROMPTS, count)).round().astype(int))
    scores = (evaluated.scores[:, : len(weights)].numpy() @ np.array(weights)).reshape(-1, samples)[
        chosen, :_MOST_SAMPLES
    ]
    rows, columns = scores.shape
    tiles = to_bytes(
        evaluated.pictures[[index * samples + column for index in chosen for column in range(columns)]]
    ).numpy()
    tiles = tiles.reshape(rows, columns, *tiles.shape[1:])
    drawn = [evaluated.prompts[index * samples] for index in chosen]
    prompts, sources = [str(prompt) for prompt in drawn], source_tiles(drawn, *tiles.shape[2:4])
    grid = Grid(tiles, prompts, scores, tuple(chosen.tolist()), sources)
    layout = {
        "prompts": prompts,
        "sources": 0 if sources is None else sources.shape[1],
        "numbers": chosen.tolist(),
        "scores": [[score if math.isfinite(score) else None for score in row] for row in scores.tolist()],
    }
    save_mosaic(path, grid.whole, layout)
    return grid


def source_tiles(prompts: list[str], height: int, width: int) -> NDArray[np.uint8] | None:
    """The source pictures of prompts that all have as many, and the middle frames of their videos (grey for a prompt
    that has none beside others), uint8 [prompts, pictures, height, width, 3], if any.
    """
    try:
        tiles = [source_pictures(prompt, height, width) for prompt in prompts]
        videos = [video_of(prompt) for prompt in prompts]
        if any(videos):
            for some, video in zip(tiles, videos, strict=True):
                grey = Image.new("RGB", (width, height), (128, 128, 128))
                some.append(grey if video is None else fitted(video.middle, height, width))
    except UserError as error:  # its embedding is kept: the run goes on without it
        _log.warning("a grid shows no source pictures: %s", error)
        return None
    return np.stack([np.stack([np.asarray(one) for one in some]) for some in tiles]) if tiles[0] else None


def load_grid(path: Path) -> Grid:
    """A grid that `save_grid` wrote. Raises ValueError for another picture."""
    try:
        whole, layout = load_mosaic(path)
        count = int(layout.get("sources", 0))
        tiles, sources = whole[:, count:], whole[:, :count] if count else None
        rows, columns = tiles.shape[:2]
        scores = np.array(layout["scores"], dtype=np.float64).reshape(rows, columns)
        prompts = [str(prompt) for prompt in layout["prompts"]]
        numbers = tuple(int(number) for number in layout.get("numbers", ()))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no sample grid") from None
    if len(prompts) != rows or len(numbers) not in (0, rows):
        raise ValueError(f"{path} is no sample grid")
    return Grid(tiles, prompts, scores, numbers, sources)
