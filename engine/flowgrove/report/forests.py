"""One prompt's forest of an iteration as a run folder keeps it: forests/iteration_NNNNNN.json with every number, and a
PNG of the same name with pictures of its leaves and clean estimates; and what a page draws of it.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowgrove.files import write_text
from flowgrove.report.mosaics import files_of_iterations, load_mosaic, save_mosaic
from flowgrove.report.pictures import Address, data_uri, encoded
from flowgrove.report.series import spread

_COLUMNS = 8  # of a mosaic
_MOST_FILES = 64  # in a run folder
_MOST_DRAWN = 6  # on a page
_MOST_BYTES = 2_000_000  # of their pictures

Number = Annotated[int, Field(ge=0, lt=2**32)]
Untrained = Literal["depth", "parent_top1", "extreme", "step_fraction"]


class _Told(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class ForestStep(_Told):
    """A step of the schedule; node i of its `nodes_in` has the children fanout·i … fanout·i + fanout − 1. `trained`:
    whether the plan trains its edges: those without noise never, nor those that pruning by depth leaves out.
    """

    sigma: float
    sigma_next: float
    solver: str
    stochastic: bool
    window: bool
    trained: bool
    fanout: Number
    nodes_in: Number
    nodes_out: Number


class ForestEdges(_Told):
    """The edges of a stochastic step, by the number of the child. `advantage` and `logp`: None where the run has none,
    as of pruned depths; `weight`: that of the edge in its update's loss, 0 where it does not train; `update`: the one
    that trains it; `untrained`: why none does.
    """

    parent: list[Number]
    advantage: list[float | None]
    logp: list[float | None]
    weight: list[float]
    update: list[Number]
    untrained: list[Untrained | None]


class ForestNumbers(_Told):
    """All that a forest is, but for its pictures. `edges`: by the index of the step; `scores`: the rewards of every
    leaf in the order of `rewards`, (name, weight) each; `totals`: their weighted sums.
    """

    iteration: Number
    prompt: str
    prompt_number: Number
    updates: Number
    rewards: list[tuple[str, float]]
    steps: Annotated[list[ForestStep], Field(min_length=1)]
    edges: dict[int, ForestEdges]
    scores: list[list[float]]
    totals: list[float]

    @model_validator(mode="after")
    def _fits_together(self) -> "ForestNumbers":
        leaves = self.steps[-1].nodes_out
        nodes = [step.nodes_in for step in self.steps[1:]] + [leaves]
        whole = all(
            step.fanout > 0 and step.nodes_in > 0 and step.nodes_in * step.fanout == step.nodes_out == after
            for step, after in zip(self.steps, nodes, strict=True)
        )
        if not whole or set(self.edges) != {index for index, step in enumerate(self.steps) if step.stochastic}:
            raise ValueError("its steps do not follow each other")
        columns = [(column, self.steps[index].nodes_out) for index, edges in self.edges.items() for _, column in edges]
        columns += [(self.scores, leaves), (self.totals, leaves), *((row, len(self.rewards)) for row in self.scores)]
        if any(len(column) != length for column, length in columns):
            raise ValueError("its numbers do not belong to its steps")
        return self


@dataclass(frozen=True)
class PromptForest:
    """A forest with pictures uint8 [h, w, 3], all of one size, by (level, node): of leaves, whose level is the number
    of steps, and of some inner nodes' clean estimates.
    """

    numbers: ForestNumbers
    pictures: dict[tuple[int, int], NDArray[np.uint8]]

    def tiles(self) -> NDArray[np.uint8]:
        """All pictures in rows of so many, uint8 [rows, columns, h, w, 3]; the last row is filled up with black."""
        tiles = np.stack(list(self.pictures.values()))
        blank = np.zeros((-len(tiles) % _COLUMNS, *tiles.shape[1:]), dtype=np.uint8)
        return np.concatenate([tiles, blank]).reshape(-1, _COLUMNS, *tiles.shape[1:])


def forest_files(run: Path) -> dict[int, Path]:
    """The forests of a run by their iterations, in that order."""
    return files_of_iterations(run / "forests", ".json")


def save_forest(run: Path, forest: PromptForest) -> None:
    """Writes a forest into a run folder. Where there are too many, the one goes that leaves the smallest gap between
    its neighbours, so that they stay spread over the whole run.

    Raises OSError, as where the disk is full.
    """
    path = run / "forests" / f"iteration_{forest.numbers.iteration:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if forest.pictures:
        save_mosaic(path.with_suffix(".png"), forest.tiles(), {"level and node": list(forest.pictures)})
    try:
        write_text(path, forest.numbers.model_dump_json())  # last: a forest that is there has its pictures
    except OSError:
        remove_forest(path)
        raise
    found = list(forest_files(run).items())
    while len(found) > _MOST_FILES:
        _, place = min((found[place + 1][0] - found[place - 1][0], place) for place in range(1, len(found) - 1))
        remove_forest(found.pop(place)[1])


def remove_forest(path: Path) -> None:
    """Removes a forest with its pictures."""
    path.unlink(missing_ok=True)
    path.with_suffix(".png").unlink(missing_ok=True)


def load_forest(path: Path) -> PromptForest:
    """A forest that `save_forest` wrote, without pictures where theirs is damaged or gone. Raises ValueError for
    another file.
    """
    numbers = _load_numbers(path)
    pictures: dict[tuple[int, int], NDArray[np.uint8]] = {}
    with suppress(ValueError, TypeError, KeyError):
        tiles, layout = load_mosaic(path.with_suffix(".png"))
        nodes = [(int(level), int(node)) for level, node in layout["level and node"]]
        pictures = dict(zip(nodes, tiles.reshape(-1, *tiles.shape[2:]), strict=False))
    return PromptForest(numbers, pictures)


def _load_numbers(path: Path) -> ForestNumbers:
    try:
        return ForestNumbers.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{path} is no forest") from None


def forest_content(run: Path, address: Address = data_uri) -> list[dict[str, Any]]:
    """Of up to six forests, spread over a run's iterations, all that a page draws, as JSON has it. Damaged files are
    passed over. `address`: where a browser finds the one picture of a forest that holds all of its tiles.
    """
    whole = list(_undamaged(run))
    chosen = [whole[place] for place in spread(len(whole), _MOST_DRAWN)]
    content = []
    for path in chosen:
        with suppress(ValueError):  # a run that goes on may have removed it since
            content.append(_drawn(load_forest(path), address, _MOST_BYTES // len(chosen)))
    return content


def _undamaged(run: Path) -> Iterator[Path]:
    for path in forest_files(run).values():
        with suppress(ValueError):
            _load_numbers(path)
            yield path


def _drawn(forest: PromptForest, address: Address, most_bytes: int) -> dict[str, Any]:
    content = json.loads(forest.numbers.model_dump_json(), parse_float=lambda text: float(f"{float(text):.5g}"))
    for edges in content["edges"].values():
        del edges["parent"]
    return {**content, "pictures": _mosaic(forest, address, most_bytes) if forest.pictures else None}


def _mosaic(forest: PromptForest, address: Address, most_bytes: int) -> dict[str, Any]:
    """One picture of all tiles, and the number of each by "level/node"; `width` and `height`: of a tile."""
    tiles = forest.tiles()
    rows, columns, height, width, _ = tiles.shape
    picture, kind = encoded(tiles, most_bytes)
    return {
        "src": address(forest.numbers.iteration, picture, kind), "rows": rows, "columns": columns, "width": width,
        "height": height, "places": {f"{level}/{node}": place for place, (level, node) in enumerate(forest.pictures)},
    }  # fmt: skip
