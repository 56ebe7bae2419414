"""Pictures of reports for README and docs, as a browser shows them: the upper part in light and dark colours, and the
forest of a run with a tree.

    python profiling/report_pictures.py runs/quickstart-42 runs/shapes_branch_mix

Needs the packages of .[dev] and a chromium.
"""

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FIGURES = Path(__file__).parent / "figures"
_WIDTH, _HEIGHT = 1120, 1000  # CSS pixels
_TALL = 3000  # the header, which stays at the top of the window, covers nothing of a section
_COLOURS = 256  # in the file: curves and flat areas, no photographs


def main() -> None:
    """Writes figures/report_light.png and report_dark.png of one run, and report_forest.png of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    parser.add_argument("tree", type=Path, help="that of one whose recipe has a tree")
    options = parser.parse_args()
    top, forest = (folder.resolve() / "report.html" for folder in (options.run, options.tree))
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not (top.exists() and forest.exists()) or chromium is None:
        sys.exit(f"{top}, {forest} and a chromium are needed: train first, and install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = _opened(browser, top, _HEIGHT, scheme)
            _write(page.screenshot(), f"report_{scheme}")
            page.close()
        _write(_opened(browser, forest, _TALL, "light").locator(".forest-body").first.screenshot(), "report_forest")
        browser.close()


def _opened(browser: Browser, file: Path, height: int, scheme: Literal["light", "dark"]) -> Page:
    page = browser.new_page(viewport={"width": _WIDTH, "height": height}, device_scale_factor=1.5, color_scheme=scheme)
    page.goto(file.as_uri(), timeout=300_000)
    return page


def _write(png: bytes, name: str) -> None:
    path = FIGURES / f"{name}.png"
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
