"""Which passes an iteration and an evaluation take, counted as the engine will pack them: every prompt as long as the
longest, and every edge that plan and pruning leave trained, whether its advantage will be 0 or not.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowgrove.evaluation import prompts_at_once
from flowgrove.models.geometry import Geometry
from flowgrove.passes.packing import Ints, pack
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove.plan.reference_velocities import keeps_reference_velocities
from flowgrove.recipe.schema import Recipe
from flowgrove.rewards.scoring import rolled_together, samples_at_once
from flowgrove.rollout.forest import edges_in_update
from flowgrove.rollout.retained_graphs import RetainedGraphs, states_in_update

# Kinds of passes. forward: without gradient; cheap: that in rollout.precision and with rollout.attention;
# extrapolated: one with attention from the steps before; kept: one whose graph stays for the first update; backward:
# of such a graph; train: forward and backward; half: a forward of both halves of guidance and a backward of one;
# reference: a forward of the reference model; renewed: a forward that takes the old policy's log-probability anew.
Bools = NDArray[np.bool_]
ROLLOUT = ("forward", "cheap", "extrapolated", "kept")


class Pass(NamedTuple):
    """A pass of the transformer: its kind, what it holds (states), and rows of each state."""

    kind: str
    states: int
    rows: int


@dataclass
class Passes:
    """How often each pass runs. `decodes`: by samples that are decoded together; `samples` are scored."""

    of_transformer: Counter[Pass] = field(default_factory=Counter)
    decodes: Counter[int] = field(default_factory=Counter)
    samples: int = 0

    def add(self, kind: str, sizes: list[int], rows: int) -> None:
        """A pass of this kind of each of these sizes, in states of so many rows."""
        self.of_transformer.update(Pass(kind, states, rows) for states in sizes)

    def states(self, *kinds: str) -> int:
        """States in passes of these kinds."""
        return sum(one.states * count for one, count in self.of_transformer.items() if one.kind in kinds)


@dataclass(frozen=True)
class Engine:
    """How a rank's engine packs. `tokens`: of a pass; `doubled`: rows of a state with guidance; `pixels_per_decode`:
    that are decoded together; `beside`: whether samples are scored beside the rollout, so that it runs some prompts at
    a time; `whole_groups`: whether a reward needs all samples of a prompt at once; `graphs` makes what keeps graphs in
    an iteration, None where none is kept; `divided`: whether ranks have divided the weights; `trained`: rows of a state
    that a backward runs through, None: all.
    """

    tokens: int
    doubled: int
    pixels_per_decode: int
    beside: bool
    whole_groups: bool = False
    graphs: Callable[[], RetainedGraphs | None] = lambda: None
    divided: bool = False
    trained: int | None = None


def passes_of_iteration(
    recipe: Recipe, plan: RolloutPlan, prompts: list[int], sizes: list[Geometry], engine: Engine
) -> list[Passes]:
    """Those of a rank that draws so many `prompts` at each of `sizes`, by size."""
    found, retained, first = [], engine.graphs(), 0
    for count, geometry in zip(prompts, sizes, strict=True):
        passes, mine = Passes(), range(first, first + count)
        kept = _roll_out(passes, recipe, plan, mine, geometry, engine, retained)
        _score(passes, count * plan.leaves, geometry, engine, plan.leaves if engine.whole_groups else 1)
        for update in range(plan.updates):
            _train(passes, recipe, plan, mine, update, geometry, engine, [] if update else kept)
        found.append(passes)
        first += count
    return found


def passes_of_evaluation(plan: RolloutPlan, prompts: int, geometry: Geometry, engine: Engine) -> Passes:
    """Those of a rank that evaluates so many `prompts` by the plan of evaluation; `engine` with its guidance."""
    found = Passes()
    some = prompts_at_once(geometry.pixels * plan.leaves)
    for start in range(0, prompts, some):
        count = min(some, prompts - start)
        for step in plan.steps:
            _forwards(found, "forward", count * step.nodes_in, engine.doubled, geometry, engine)
        _score(found, count * plan.leaves, geometry, engine)
    return found


def _roll_out(
    found: Passes, recipe: Recipe, plan: RolloutPlan, prompts: range, geometry: Geometry, engine: Engine,
    retained: RetainedGraphs | None,
) -> list[int]:  # fmt: skip
    """Counts the rollout's passes; returns the states of each that keeps its graph."""
    share, kept = recipe.engine.share, []
    for part in _parts(recipe, plan, prompts, geometry, engine):
        for step in plan.steps:
            rest = len(part) * (step.nodes_in if share else plan.leaves)
            doubled = engine.doubled if plan.guided(step) else 1
            if retained is not None:
                trained = int(states_in_update(plan, step, part, 0).sum())
                for some in _packed(trained, geometry.tokens * doubled, engine):
                    if retained.takes(len(some)):
                        found.of_transformer[Pass("kept", len(some), doubled)] += 1
                        kept.append(len(some))
                        rest -= len(some)
            kind = "extrapolated" if plan.extrapolates(step) else "cheap" if plan.cheap(step) else "forward"
            _forwards(found, kind, rest, doubled, geometry, engine)
    return kept


def _parts(recipe: Recipe, plan: RolloutPlan, prompts: range, geometry: Geometry, engine: Engine) -> Iterator[range]:
    """The prompts that are rolled out together."""
    together = len(prompts)
    if engine.beside and not recipe.engine.exact_replay:
        narrowest = geometry.tokens * engine.doubled * (plan.roots if recipe.engine.share else plan.leaves)
        together = rolled_together(engine.tokens, narrowest)
    for start in range(0, len(prompts), together or 1):
        yield prompts[start : start + together]


def _train(
    found: Passes, recipe: Recipe, plan: RolloutPlan, prompts: range, update: int, geometry: Geometry, engine: Engine,
    kept: list[int],
) -> None:  # fmt: skip
    share, replays = recipe.engine.share, recipe.engine.exact_replay and recipe.engine.share
    keeps = keeps_reference_velocities(recipe, plan, engine.divided)
    sizes: list[int] = []
    references = list(kept)  # rows of each pass whose reference velocity is not known yet
    row = geometry.tokens * engine.doubled
    rows: list[Bools] = []
    for step in plan.trained_steps:
        mask = states_in_update(plan, step, prompts, update).ravel()
        earlier = [states_in_update(plan, step, prompts, number).ravel() for number in range(update if keeps else 0)]
        if replays:
            for some in _packed(len(mask), row, engine):
                if mask[some].any():
                    sizes.append(len(some))
                    references.append(0 if any(one[some].any() for one in earlier) else len(some))
        elif share:
            rows.append(~np.logical_or.reduce([np.zeros_like(mask), *earlier])[mask])
        else:
            rows.append(np.ones(_edges(plan, step, prompts, update), dtype=bool))
    new = np.concatenate([*rows, np.zeros(0, dtype=bool)])[sum(kept) :]
    for some in _packed(len(new), row, engine):
        sizes.append(len(some))
        references.append(int(new[some].sum()))
    if engine.trained in (None, engine.doubled):
        found.add("train", sizes, engine.doubled)
    else:
        found.add("half", sizes, engine.doubled)
    found.add("backward", kept, engine.trained or engine.doubled)
    if recipe.update.kl_weight > 0:
        found.add("reference", [states for states in references if states], engine.doubled)
    noisy = recipe.model.dtype == "bf16" and share and not replays and recipe.update.step_weight != "guard"
    if update > 0 and noisy:
        found.add("renewed", sizes, engine.doubled)


def _edges(plan: RolloutPlan, step: Step, prompts: range, update: int) -> int:
    """Edges of a step that the update trains, where each is a row of its own."""
    mine = edges_in_update(plan, step, update)
    return sum(int((np.array(plan.kept_edges(step, prompt, plan.countable_leaves)) & mine).sum()) for prompt in prompts)


def _score(found: Passes, samples: int, geometry: Geometry, engine: Engine, group: int = 1) -> None:
    """Decoding and scoring, some samples at a time, whole groups of them."""
    found.samples += samples
    some, together = samples_at_once(geometry.pixels, group), max(1, engine.pixels_per_decode // geometry.pixels)
    for start in range(0, samples, some):
        part = min(some, samples - start)
        whole, rest = divmod(part, together)
        found.decodes[together] += whole
        found.decodes[rest] += rest > 0
    found.decodes = +found.decodes


def _forwards(found: Passes, kind: str, states: int, doubled: int, geometry: Geometry, engine: Engine) -> None:
    found.add(kind, [len(some) for some in _packed(states, geometry.tokens * doubled, engine)], doubled)


def _packed(states: int, tokens: int, engine: Engine) -> list[Ints]:
    """The passes of so many states of `tokens` each."""
    return pack(np.full(states, tokens), engine.tokens) if states else []
