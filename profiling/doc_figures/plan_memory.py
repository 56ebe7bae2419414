"""plan_memory.csv: what `flowgrove plan --memory` predicts of the shipped recipes, kept since it takes a quarter of a
minute each; a line per number, in bytes.

`python profiling/make_figures.py --predictions` remakes it, and a test of `make test-long` predicts anew.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from doc_figures.registry import FOLDER, ROOT, Row, Rows
from flowgrove.bench.table import write_columns
from flowgrove.plan.communication import Communication, Prediction, predict
from flowgrove.plan.division import Division
from flowgrove.plan.memory import Memory
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup

MEMORY = "plan_memory.csv"
_COLUMNS = ("recipe", "settings", "ranks", "reshard_after_forward", "rows_per_pass", "part", "name", "bytes")
_BASES = ("flux", "sd35m")  # recipes that others extend
_STAYS, _BESIDE, _GRAPH, _SENT, _EVALUATION = "stays", "beside it", "a kept graph", "sent", "sent in an evaluation"


class Planned(NamedTuple):
    """A recipe of recipes/ by its name, with `settings` as --set takes them, and the ranks that it is planned for."""

    recipe: str
    settings: tuple[str, ...] = ()
    ranks: int = 1

    def load(self) -> Recipe:
        return _setup(self).recipe

    def plan(self) -> RolloutPlan:
        """Of the first iteration."""
        return _setup(self).first_plan

    def predict(self) -> list[Prediction]:
        recipe = self.load()
        return predict(recipe, self.plan(), "cuda", self.division(recipe))

    def division(self, recipe: Recipe) -> Division:
        return Division.of(recipe.engine, self.ranks)


@cache
def _setup(planned: Planned) -> Setup:
    return Setup(load_recipe(ROOT / "recipes" / f"{planned.recipe}.yaml", planned.settings))


def shipped() -> list[str]:
    """The recipes for models that have to be downloaded."""
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    return [name for name in names if not name.startswith(("shapes", "quickstart")) and name not in _BASES]


WHOLE_FLUX = Planned("mix_flux", ("model.lora=null",))
DIVIDED_FLUX = Planned(
    "mix_flux", ("model.lora=null", "engine.distributed=fsdp2", "data.prompts_per_iteration=32"), ranks=8
)
PLANNED = (*map(Planned, shipped()), WHOLE_FLUX, DIVIDED_FLUX)


def write_memory(root: Path = ROOT) -> None:
    """Predicts all and writes the CSV."""
    rows = [row for planned in PLANNED for row in _rows(planned, planned.predict())]
    write_columns(rows, _COLUMNS, root / FOLDER / MEMORY)


def _rows(planned: Planned, predictions: list[Prediction]) -> Iterator[Row]:
    for found in predictions:
        memory, communication = found.memory, found.communication
        sizes = [
            *((_STAYS, name, size) for name, size in memory.resident.items()),
            *((_BESIDE, name, size) for name, size in memory.stages.items()),
            (_GRAPH, "", memory.graph),
            *((_SENT, name, size) for name, size in communication.iteration.items()),
            (_EVALUATION, "", communication.evaluation),
        ]
        where = {
            "recipe": planned.recipe, "settings": " ".join(planned.settings), "ranks": planned.ranks,
            "reshard_after_forward": found.reshard, "rows_per_pass": memory.rows,
        }  # fmt: skip
        yield from ({**where, "part": part, "name": name, "bytes": size} for part, name, size in sizes)


def predictions_in(rows: Rows, planned: Planned) -> list[Prediction]:
    """What the CSV holds of `planned`."""
    own = [
        row
        for row in rows
        if (row["recipe"], row["settings"] or "", row["ranks"])
        == (planned.recipe, " ".join(planned.settings), planned.ranks)
    ]
    if not own:
        raise ValueError(f"{MEMORY} has no {planned}: make figures PREDICTIONS=1")
    found = []
    for reshard in dict.fromkeys(row["reshard_after_forward"] for row in own):
        way = [row for row in own if row["reshard_after_forward"] == reshard]

        def sizes(part: str, way: Rows = way) -> dict[str, int]:
            return {row["name"] or "": row["bytes"] for row in way if row["part"] == part}

        memory = Memory(sizes(_STAYS), sizes(_BESIDE), sizes(_GRAPH)[""], way[0]["rows_per_pass"])
        found.append(Prediction(reshard == "True", memory, Communication(sizes(_SENT), sizes(_EVALUATION)[""])))
    return found


def peak_gib(rows: Rows, planned: Planned) -> str:
    """GiB of one GPU, whole."""
    return f"{predictions_in(rows, planned)[0].memory.peak / 2**30:.0f}"
