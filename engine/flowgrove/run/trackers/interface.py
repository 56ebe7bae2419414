"""What a tracker is told of a run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Status = Literal["finished", "stopped", "failed"]  # stopped: by a signal, to go on later


@dataclass(frozen=True)
class Opening:
    """A run as a tracker gets to know it. `folder`: the run's, absolute; `first_iteration`: the first that it will be
    told of, more than 0 where a run goes on; `id`: what this tracker called the run before, None at first; `process`:
    the one that trains. The rest is run.tracking of the recipe.
    """

    folder: str
    name: str
    recipe: dict[str, Any]
    first_iteration: int = 0
    id: str | None = None
    process: int = 0
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    mode: Literal["online", "offline"] | None = None


@dataclass(frozen=True)
class Opened:
    """`id`: under which the run will go on, where that needs one; `address`: where it can be looked at; `describe`:
    tells what the run is, once its id is kept; an error of it is a warning, as the run has been begun.
    """

    id: str | None = None
    address: str | None = None
    describe: Callable[[], object] | None = None


class Pictures(Protocol):
    """Samples of held-out prompts: tiles uint8 [prompts, samples, H, W, 3], scores float64 [prompts, samples], NaN
    where there is none; sources uint8 [prompts, sources, H, W, 3], the prompts' own pictures and frames of their
    videos, where they have some.
    """

    @property
    def prompts(self) -> list[str]: ...
    @property
    def scores(self) -> NDArray[np.float64]: ...
    @property
    def tiles(self) -> NDArray[np.uint8]: ...
    @property
    def sources(self) -> NDArray[np.uint8] | None: ...


class Tracker(Protocol):
    """One service's or file's view of a run. Its methods may raise anything and take any time."""

    def open(self, opening: Opening) -> Opened:
        """Begins the run or goes on with it. It is called again after it has raised."""

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        """The numbers of one iteration, nested ones as `seconds/update`."""

    def pictures(self, completed: int, pictures: Pictures) -> None:
        """What the model draws after so many completed iterations."""

    def close(self, status: Status) -> None:
        """Sends what is left and ends."""


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section/key`."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def tiles(pictures: Pictures) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Each picture [H, W, 3], with its prompt and score; before those of a prompt its sources."""
    for row, prompt in enumerate(pictures.prompts):
        for source in () if pictures.sources is None else pictures.sources[row]:
            yield source, f"{prompt} (source)"
        for tile, score in zip(pictures.tiles[row], pictures.scores[row], strict=True):
            yield tile, f"{prompt} ({_text(score)})"


def rows(pictures: Pictures) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """The sources and samples of each prompt side by side [H, (sources + samples) · W, 3], with the prompt and the
    scores of the samples.
    """
    for row, prompt in enumerate(pictures.prompts):
        sources = () if pictures.sources is None else pictures.sources[row]
        side_by_side = np.concatenate([*sources, *pictures.tiles[row]], axis=1)
        yield side_by_side, f"{prompt} ({', '.join(map(_text, pictures.scores[row]))})"


def _text(score: float) -> str:
    return "no score" if np.isnan(score) else f"{score:.3f}"
