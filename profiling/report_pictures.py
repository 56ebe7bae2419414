"""Pictures of a run's report.html for README, in light and dark colours, as a browser shows its upper part.

python profiling/report_pictures.py runs/quickstart-42   # needs the packages of .[dev] and a chromium
"""

import argparse
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FIGURES = Path(__file__).parent / "figures"
_WIDTH, _HEIGHT = 1120, 1000  # CSS pixels
_COLOURS = 128  # in the file: curves and flat areas, no photographs


def main() -> None:
    """Writes figures/report_light.png and report_dark.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run that has ended")
    page_file = parser.parse_args().run.resolve() / "report.html"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not page_file.exists() or chromium is None:
        sys.exit(f"{page_file} and a chromium are needed: train first, and install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport={"width": _WIDTH, "height": _HEIGHT}, device_scale_factor=1.5, color_scheme=scheme
            )
            page.goto(page_file.as_uri(), timeout=300_000)
            picture = Image.open(io.BytesIO(page.screenshot()))
            path = FIGURES / f"report_{scheme}.png"
            picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
