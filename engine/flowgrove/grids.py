"""Sample grids: one PNG per evaluation, a row per prompt, with prompts and scores inside the file, so that a report can set two of them side by side."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrove.evaluation import Evaluated
from flowgrove.files import write_file
from flowgrove.pixels import to_bytes

_MOST_PROMPTS, _MOST_SAMPLES = 8, 4


@dataclass(frozen=True)
class Grid:
    """tiles uint8 [prompts, samples, H, W, 3]; scores [prompts, samples], weighted sums, NaN where nothing was scored."""

    tiles: NDArray[np.uint8]
    prompts: list[str]
    scores: NDArray[np.float64]


def save_grid(path: Path, evaluated: Evaluated, samples: int, weights: list[float]) -> None:
    """Writes the first prompts of an evaluation, spread over the list, as a PNG."""
    count = len(evaluated.prompts) // samples
    chosen = np.unique(np.linspace(0, count - 1, min(_MOST_PROMPTS, count)).round().astype(int))
    scores = (evaluated.scores.numpy() @ np.array(weights)).reshape(-1, samples)[chosen, :_MOST_SAMPLES]
    rows, columns = scores.shape
    tiles = to_bytes(evaluated.pictures[[index * samples + column for index in chosen for column in range(columns)]]).numpy()
    prompts = [evaluated.prompts[index * samples] for index in chosen]
    info = PngInfo()
    info.add_itxt("flowgrove", json.dumps({"rows": rows, "columns": columns, "prompts": prompts, "scores": scores.tolist()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = tiles.shape[1:3]
    mosaic = Image.fromarray(tiles.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
    write_file(path, lambda partial: mosaic.save(partial, pnginfo=info))


def load_grid(path: Path) -> Grid:
    """A grid that `save_grid` wrote."""
    with Image.open(path) as image:
        layout = json.loads(image.info["flowgrove"])
        pixels = np.asarray(image.convert("RGB"))
    rows, columns = layout["rows"], layout["columns"]
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    tiles = pixels.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4)
    return Grid(tiles, layout["prompts"], np.array(layout["scores"]))
