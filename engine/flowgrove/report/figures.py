"""matplotlib without a display, for every module that draws:
`pyplot`, and figures as files that are whole or absent.
"""

import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from flowgrove.files import write_file

__all__ = ["literal", "pyplot", "save_figure"]


def literal(text: str, argument: str = "s") -> dict[str, Any]:
    """Arguments of matplotlib's text functions that show `text` as it is: $…$ is no mathematics. `argument`: what they
    call the text."""
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return {argument: shown, "parse_math": False, "usetex": False}


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Writes `figure` and closes it; the suffix of `path` names the format."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            write_file(path, lambda partial: figure.savefig(partial, dpi=dpi))
    finally:
        pyplot.close(figure)
