"""The documentation points to what exists: files, headings, tests and recipe keys."""

import re
from functools import cache
from pathlib import Path

import pytest

from doc_pages import PAGES, ROOT

_LINK = re.compile(r"\]\(([^)\s]+)\)|<img\s[^>]*src=\"([^\"]+)\"")
_CODE = re.compile(r"`([^`\n]+)`")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    .*$", re.MULTILINE)
_PLACES = ("", "engine/flowgrove", "tests", "kernels/flowgrove_kernels")  # what a path in the text may be beside


@cache
def text_of(page: Path) -> str:
    """The page without its blocks of code."""
    return _INDENTED.sub("", _FENCED.sub("", page.read_text(encoding="utf-8")))


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives its headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@cache
def names_of_tests() -> frozenset[str]:
    sources = (path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    return frozenset(name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in ("".join(found) for found in _LINK.findall(text_of(ROOT / page))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page):
    beside = (ROOT / page).parent
    missing = []
    for code in _CODE.findall(text_of(ROOT / page)):
        if re.fullmatch(r"test_\w+", code) and code not in names_of_tests():
            missing.append(code)
        is_path = re.fullmatch(r"(?:[a-z]\w*/)+[a-z0-9_.]+\.(py|cuh?|cpp|h|md|yaml|csv|png)", code)
        if is_path and not any((base / code).exists() for base in (beside, *(ROOT / place for place in _PLACES))):
            missing.append(code)
    assert not missing


def test_every_page_is_reached_from_the_front_page():
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = ("".join(found).partition("#")[0] for found in _LINK.findall(text_of(page)))
        ahead += [(page.parent / link).resolve() for link in links if link and not re.match(r"https?://", link)]
    assert {ROOT / page for page in PAGES} <= reached
