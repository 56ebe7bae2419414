"""What the pages show of measurements, and where each figure comes from.

A table stands in its page between two comments that Markdown does not show,

    <!-- figures: NAME, from profiling/figures/X.csv -->
    <!-- end -->

and is registered by a function of that name (with hyphens for underscores), which makes it from the rows of its CSVs:

    @block("docs/performance.md", "X.csv")
    def name(rows):
        return table(("recipe", "seconds"), [(row["recipe"], f"{row['seconds']:.1f}") for row in rows])

The numbers of a sentence are registered by a function that yields the sentence, with {} where a number stands, and the
numbers as they are written there; line ends do not count:

    @numbers("README.md", "X.csv")
    def seconds_of_an_iteration(rows):
        yield "takes {} seconds", f"{rows[0]['seconds']:.1f}"
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrove.bench.table import read_columns

ROOT = Path(__file__).parents[2]
FOLDER = "profiling/figures"
Row = dict[str, Any]
Rows = list[Row]


@dataclass(frozen=True)
class Block:
    """Lines between the comments `name` of `page`; `csvs`: names in FOLDER, whose rows `make` takes; `origin`: what the
    opening comment says of them."""

    page: str
    name: str
    csvs: tuple[str, ...]
    origin: str
    make: Callable[..., str]

    def text(self, root: Path) -> str:
        return self.make(*rows_of(root, self.csvs))


@dataclass(frozen=True)
class Numbers:
    """Sentences of `page` with numbers from `csvs`."""

    page: str
    csvs: tuple[str, ...]
    make: Callable[..., Iterable[tuple[str, ...]]]

    def sentences(self, root: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(the sentence with {} where numbers stand, the numbers)."""
        for sentence, *values in self.make(*rows_of(root, self.csvs)):
            yield sentence, tuple(values)


BLOCKS: list[Block] = []
NUMBERS: list[Numbers] = []


def block(page: str, *csvs: str, origin: str = "") -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers what makes a block of `page`. `origin`: what it is made from, where that is not CSVs alone."""

    def register(make: Callable[..., str]) -> Callable[..., str]:
        told = origin or " and ".join(f"{FOLDER}/{name}" for name in csvs)
        BLOCKS.append(Block(page, make.__name__.replace("_", "-"), csvs, told, make))
        return make

    return register


def numbers(
    page: str, *csvs: str
) -> Callable[[Callable[..., Iterable[tuple[str, ...]]]], Callable[..., Iterable[tuple[str, ...]]]]:
    """Registers a generator of sentences of `page` with their numbers."""

    def register(make: Callable[..., Iterable[tuple[str, ...]]]) -> Callable[..., Iterable[tuple[str, ...]]]:
        if not inspect.isgeneratorfunction(make):
            raise TypeError(f"{make.__name__} has to yield (sentence, number, number, …)")
        NUMBERS.append(Numbers(page, csvs, make))
        return make

    return register


def rows_of(root: Path, csvs: Iterable[str]) -> list[Rows]:
    return [read_columns(root / FOLDER / name) for name in csvs]


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    heads = tuple(heads)
    lines = [heads, *(tuple(row) for row in rows)]
    if any(len(line) != len(heads) for line in lines):
        raise ValueError(f"a row of the table {heads[0]!r}, … has not {len(heads)} cells")
    text = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(heads), *text[1:]])


def only(rows: Rows, /, **values: Any) -> Row:
    """The row with these values. Raises ValueError unless there is exactly one."""
    found = [row for row in rows if all(row[key] == value for key, value in values.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {values}")
    return found[0]


def version(text: str) -> str:
    """2.11 of 2.11.0+cu130."""
    return ".".join(str(text).split("+")[0].split(".")[:2])
