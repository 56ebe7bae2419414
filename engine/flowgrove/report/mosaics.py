"""Pictures of one size beside each other in one PNG, with what they show inside the file; and files that are named
after iterations.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flowgrove.files import write_file


def files_of_iterations(folder: Path, suffix: str) -> dict[int, Path]:
    """The files iteration_NNNNNN of this suffix by their numbers, in that order."""
    found = {path.stem.removeprefix("iteration_"): path for path in folder.glob(f"iteration_*{suffix}")}
    return dict(sorted((int(name), path) for name, path in found.items() if name.isdecimal() and name.isascii()))


def save_mosaic(path: Path, tiles: NDArray[np.uint8], layout: dict[str, Any]) -> None:
    """Writes tiles uint8 [rows, columns, H, W, 3] as one PNG, which carries `layout` with their `rows` and `columns`.

    Raises OSError, as where the disk is full.
    """
    rows, columns, height, width, _ = tiles.shape
    info = PngInfo()
    info.add_itxt("flowgrove", json.dumps({"rows": rows, "columns": columns, **layout}))
    path.parent.mkdir(parents=True, exist_ok=True)
    mosaic = Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))
    write_file(path, lambda partial: mosaic.save(partial, pnginfo=info))


def load_mosaic(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Tiles and layout of a file that `save_mosaic` wrote. Raises ValueError for another or a damaged one, and
    PermissionError.
    """
    try:
        with Image.open(path) as image:
            layout = json.loads(image.info["flowgrove"])
            pixels = np.asarray(image.convert("RGB"))
        rows, columns = layout["rows"], layout["columns"]
        height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
        return pixels.reshape(rows, height, columns, width, 3).transpose(0, 2, 1, 3, 4), layout
    except PermissionError:
        raise
    except (OSError, SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError, Image.DecompressionBombError):
        raise ValueError(f"{path} is no mosaic of pictures") from None
