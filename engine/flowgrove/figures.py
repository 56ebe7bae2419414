"""matplotlib without a display, for every module that draws: `pyplot`, and figures as files that are whole or absent."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from flowgrove.files import write_file

__all__ = ["pyplot", "save_figure"]


def save_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Writes `figure` and closes it; the suffix of `path` names the format."""
    write_file(path, lambda partial: figure.savefig(partial, dpi=dpi))
    pyplot.close(figure)
