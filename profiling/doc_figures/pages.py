"""Tables and numbers in the pages: what a page should say, and where it says something else."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from doc_figures.registry import BLOCKS, NUMBERS, ROOT

_OPEN = re.compile(r"^<!-- figures: (?P<name>[\w-]+), from (?P<origin>.+?) -->$", re.MULTILINE)
_END = "<!-- end -->"
_NUMBER = r"(−?[\d.,]*\d)"


def pages() -> list[str]:
    """All pages that hold a block or a sentence with numbers."""
    return sorted({block.page for block in BLOCKS} | {entry.page for entry in NUMBERS})


def renewed(page: str, root: Path = ROOT) -> str:
    """The text of `page` with its blocks and numbers as the CSVs of `root` have them.

    Raises ValueError where a comment that belongs to a block is missing, unknown or double, and where a registered
    sentence does not stand in the page exactly once.
    """
    text = (root / page).read_text(encoding="utf-8")
    blocks = {block.name: block for block in BLOCKS if block.page == page}
    named = [found["name"] for found in _OPEN.finditer(text)]
    if sorted(named) != sorted(blocks):
        raise ValueError(f"{page} has comments for the blocks {sorted(named)}, registered are {sorted(blocks)}")
    for name, block in blocks.items():
        opening = next(found for found in _OPEN.finditer(text) if found["name"] == name)
        end = text.find(_END, opening.end())
        following = _OPEN.search(text, opening.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f"{page}: no {_END} behind the block {name}")
        made = f"<!-- figures: {name}, from {block.origin} -->\n{block.text(root)}\n"
        text = text[: opening.start()] + made + text[end:]
    for entry in NUMBERS:
        if entry.page == page:
            for sentence, values in entry.sentences(root):
                text = _with_numbers(page, text, sentence, values)
    return text


def _with_numbers(page: str, text: str, sentence: str, values: tuple[str, ...]) -> str:
    """`text` with these numbers in the sentence."""
    found = place_of(page, text, sentence, len(values))
    for place in range(len(values), 0, -1):
        start, end = found.span(place)
        text = text[:start] + values[place - 1] + text[end:]
    return text


def place_of(page: str, text: str, sentence: str, count: int) -> re.Match[str]:
    """Where `sentence` stands in the text of `page`, its `count` numbers as groups."""
    parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in sentence.split("{}")]
    if len(parts) != count + 1:
        raise ValueError(f"{page}: {sentence!r} has {len(parts) - 1} places for {count} numbers")
    found = list(re.finditer(_NUMBER.join(parts), text))
    if len(found) != 1:
        raise ValueError(f"{page} has {len(found)} sentences like {sentence!r}: register it as it stands there, once")
    return found[0]


def differences(page: str, root: Path = ROOT) -> Iterator[str]:
    """The lines of `page` that its CSVs do not bear out, with - before them, and with + what these say."""
    told, made = (root / page).read_text(encoding="utf-8").splitlines(), renewed(page, root).splitlines()
    for line in difflib.unified_diff(told, made, lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield line
