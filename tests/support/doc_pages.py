"""The pages that users read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "engine/flowgrove/models/families/README.md",
        *ROOT.glob("docs/*.md"),
    )
)
