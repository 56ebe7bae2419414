"""What advice is derived from: the seconds and rows of a profile, beside the counts of the recipe's plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flowgrove.errors import UserError
from flowgrove.plan.planner import Counts, RolloutPlan
from flowgrove.profiler.gaps import Idle
from flowgrove.profiler.phases import OTHER, Phase
from flowgrove.recipe.checks import check_meaning
from flowgrove.recipe.files import apply_override
from flowgrove.recipe.loading import parse_recipe
from flowgrove.recipe.schema import Recipe
from flowgrove.setup import Setup
from flowgrove.spans import DECODE, REWARD, TRANSFORMER

_LEAST = 0.03  # of an iteration: what saves less is not worth a try


@dataclass(frozen=True)
class Facts:
    """What the rules look at. `phases` and `seconds` are of one iteration; `doubles`: whether guidance takes a second
    row; `budget`: tokens of a pass; `idle`: None on a CPU; `utilisation`: of the matrix rate by the transformer, None
    where it is not known; `fits`: whether another recipe fits into the memory.
    """

    setup: Setup
    device_type: str
    seconds: float
    phases: list[Phase]
    budget: int
    doubles: bool = False
    idle: Idle | None = None
    utilisation: float | None = None
    fits: Callable[[Recipe], bool] = field(default=lambda recipe: True)

    @property
    def recipe(self) -> Recipe:
        return self.setup.recipe

    @property
    def plan(self) -> RolloutPlan:
        return self.setup.first_plan

    def tells(self, saved: float) -> bool:
        """Whether so many seconds are worth telling of."""
        return saved >= _LEAST * self.seconds

    def spent(self, *, stage: str | None = None, kind: str | None = None, name: str | None = None) -> float:
        """Seconds of the iteration's own phases of this stage, of this kind and with this end of their name."""
        return sum(phase.seconds for phase in self._some(stage, kind, name))

    def rows(self, *, stage: str | None = None, kind: str | None = None, name: str | None = None) -> float:
        """Their rows."""
        return sum(phase.rows for phase in self._some(stage, kind, name))

    def _some(self, stage: str | None, kind: str | None, name: str | None) -> Iterator[Phase]:
        for phase in self.phases:
            last = phase.name.rpartition("/")[2]
            wanted = stage in (None, phase.stage) and kind in (None, phase.kind) and name in (None, last)
            if wanted and not phase.beside and last != OTHER and not phase.waits:
                yield phase

    def waited(self, kind: str) -> float:
        """Seconds in which the iteration decodes or scores, or waits for the second thread that does: of that wait, the
        kind's share of the thread's work.
        """
        own = sum(phase.seconds for phase in self.phases if phase.kind == kind and not phase.beside)
        beside = {
            each: sum(phase.seconds for phase in self.phases if phase.beside and phase.kind == each)
            for each in (DECODE, REWARD)
        }
        waiting = sum(phase.seconds for phase in self.phases if phase.waits and not phase.beside)
        whole = sum(beside.values())
        return own + (waiting * beside[kind] / whole if whole else 0.0)

    @cached_property
    def forward(self) -> float:
        """Seconds of a row's forward in the rollout."""
        rows = self.rows(stage="rollout", kind=TRANSFORMER)
        return self.spent(stage="rollout", kind=TRANSFORMER) / rows if rows else 0.0

    @cached_property
    def train(self) -> float:
        """Seconds of the update per row that goes backward."""
        rows = self.rows(stage="update", name="backward")
        return self.spent(stage="update", kind=TRANSFORMER) / rows if rows else 0.0

    def changed(self, section: str, **keys: Any) -> Setup | None:
        """The set-up with other keys of a section; None where no such plan can be made."""
        part = getattr(self.recipe, section).model_copy(update=keys)
        other = Setup(self.recipe.model_copy(update={section: part}))
        try:
            return other if other.first_plan else None
        except UserError:
            return None

    def allows(self, key: str, value: str) -> bool:
        """Whether `--set key=value` makes a recipe that is not refused."""
        content = self.recipe.model_dump(mode="json")
        try:
            apply_override(content, f"{key}={value}")
            check_meaning(parse_recipe(content))
        except UserError:
            return False
        return True

    def rows_of(self, counts: Counts) -> tuple[int, int]:
        """(forwards of the rollout, training passes) of all prompts."""
        prompts, share = self.recipe.data.prompts_per_iteration, self.recipe.engine.share
        forwards = counts.rollout_forwards if share else counts.unshared_rollout_forwards
        return prompts * forwards, prompts * (counts.train_passes if share else counts.unshared_train_passes)
