"""The plots in profiling/figures/: which CSV each is drawn from, and by what.

A plot holds the name and the SHA-256 of its CSV, so that a test knows one that is older than it.
"""

import hashlib
import importlib
import shutil
import tempfile
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

from doc_figures.registry import FOLDER, ROOT, rows_of
from flowgrove.files import write_file

# names of CSVs → module and function (rows, path) that draws the PNG of the same name
DRAWN = {
    "ops_*.csv": ("flowgrove.bench.plot", "plot_ops"),
    "engine_*.csv": ("flowgrove.bench.engine_plot", "plot_engine"),
    "scaling_*.csv": ("flowgrove.bench.scaling_plot", "plot_scaling"),
    "roofline_*.csv": ("roofline", "plot_roofline"),
    "quickstart_reward.csv": ("doc_figures.quickstart", "plot_reward"),
    "compare_*_curves.csv": ("doc_figures.compared", "plot_curves"),
    "gradient_variance.csv": ("doc_figures.gradient_variance", "plot"),
    "signal_to_noise.csv": ("doc_figures.signal_to_noise", "plot"),
}
# plots that no CSV holds → where they come from
FROM_RUNS = {
    "quickstart_before_after.png": "make figures RUN=runs/quickstart-42",
    **dict.fromkeys(
        ("report_light.png", "report_dark.png", "report_forest.png"),
        "python profiling/report_pictures.py runs/quickstart-42 RUN, a run of recipes/shapes_branch_mix.yaml",
    ),
}
# CSVs that are kept for the reader, of which no page and no plot shows a number → why
RAW: dict[str, str] = {}
_SOURCE = "Source"


def plotter(csv: str) -> tuple[str, str] | None:
    """What draws `csv`."""
    return next((draws for pattern, draws in DRAWN.items() if fnmatch(csv, pattern)), None)


def drawn_csvs(root: Path = ROOT) -> list[Path]:
    return sorted(path for path in (root / FOLDER).glob("*.csv") if plotter(path.name))


def draw(csv: Path, picture: Path) -> None:
    """Draws `csv` as `picture`."""
    module, name = plotter(csv.name) or ("", "")
    getattr(importlib.import_module(module), name)(rows_of(csv.parents[2], [csv.name])[0], picture)
    info = PngInfo()
    info.add_text(_SOURCE, source_of(csv))
    with Image.open(picture) as image:
        image.load()
    write_file(picture, lambda file: image.save(file, pnginfo=info, optimize=True))


def source_of(csv: Path) -> str:
    """What a plot says of its CSV; line ends do not count."""
    return f"{csv.name} sha256:{hashlib.sha256(csv.read_text(encoding='utf-8').encode()).hexdigest()}"


def told_source(picture: Path) -> str:
    with Image.open(picture) as image:
        return image.info.get(_SOURCE, "")


def redraw(root: Path = ROOT) -> list[Path]:
    """Draws all plots; those that look the same and know their CSV stay as they are. Returns the others."""
    changed = []
    with tempfile.TemporaryDirectory() as folder:
        for csv in drawn_csvs(root):
            picture, new = csv.with_suffix(".png"), Path(folder) / f"{csv.stem}.png"
            draw(csv, new)
            if picture.exists() and told_source(picture) == source_of(csv) and look_alike(picture, new):
                continue
            write_file(picture, partial(shutil.copyfile, new))
            changed.append(picture)
    return changed


def look_alike(first: Path, second: Path) -> bool:
    """Whether two pictures have the same pixels."""
    with Image.open(first) as one, Image.open(second) as other:
        same_size = one.size == other.size
        return same_size and ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None
