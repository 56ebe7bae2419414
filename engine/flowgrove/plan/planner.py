"""The plan of one iteration: what every step of the schedule does, and what it costs. A pure function of recipe and
iteration, and of the splits that were chosen where the recipe leaves them open: no tensors, no model.

A rollout is a forest. Level t holds the distinct states before step t; node i of a level with fanout K has the children
K·i … K·i + K−1, so the leaves below a node are contiguous. All algorithms differ only in σ, solver (`solvers.py`),
fanout and `trained` of their steps.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple, TypeVar

from flowgrove.errors import UserError
from flowgrove.plan.sigmas import SigmaTable, round_half_up, shifted_sigmas, tail_steps
from flowgrove.plan.solvers import PLAIN, SOLVERS, history
from flowgrove.plan.split_search import Splits, SplitSearch
from flowgrove.recipe.schema import Cache, Expert, Prune, Recipe, Rollout, Tree
from flowgrove.recipe.windows import pruned_depths, window_steps

Number = TypeVar("Number", int, float)
_LOOKED_AT = 1000  # iterations
_ROUNDING = 1e-6  # of σ: a step at the boundary itself is of the expert for high noise


@dataclass(frozen=True)
class Step:
    """One level of the forest, per prompt: nodes_in states become nodes_out = nodes_in · fanout.

    `coefficients` names its row in flowgrove_kernels.coefficients, which is its solver's, or of the first steps of a
    solver with history the one that starts it. `expert`: that runs it, None: the model has one transformer.
    `position`: where it begins in the schedule of rollout.steps, which is its index, but in a compressed tail.
    `takes_estimate`: that row uses the clean estimate of the step before;
    `leaves_estimate`: the step after takes this one's.
    """

    index: int
    sigma: float
    sigma_next: float
    solver: str
    coefficients: str
    stochastic: bool
    takes_estimate: bool
    leaves_estimate: bool
    fanout: int
    trained: bool
    nodes_in: int
    nodes_out: int
    position: float
    expert: Expert | None = None


@dataclass(frozen=True)
class Counts:
    """Per prompt, one pass = one row (guidance not doubled); advantages that are 0 by construction still count."""

    leaves: int
    rollout_forwards: int
    edges: int
    trained_edges: int
    train_passes: int
    unshared_rollout_forwards: int
    unshared_train_passes: int


def weighted_passes(forwards: Number, train_passes: Number) -> Number:
    """What they cost in forwards: a pass that trains computes forward and backward, which is about three of them."""
    return forwards + 3 * train_passes


@dataclass(frozen=True)
class RolloutPlan:
    iteration: int
    window: tuple[int, ...]
    steps: tuple[Step, ...]
    sigma_max: float  # second entry of the table
    noise_level: float
    split_noise_scale: float
    sibling_correlation: float
    updates_per_iteration: int
    edges_per_update: int | None
    keep_siblings: bool
    step_fraction: float
    prune: Prune | None
    seed: int
    guidance_range: tuple[int, int] | None
    cache: Cache | None
    precision: Literal["fp8", "int8"] | None = None
    attention: str | None = None
    fuses: bool = False  # whether credit takes the log-probability of every stochastic step, trained or not

    @property
    def roots(self) -> int:
        return self.steps[0].nodes_in

    @property
    def leaves(self) -> int:
        return self.steps[-1].nodes_out

    @cached_property
    def trained_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.trained)

    @cached_property
    def experts(self) -> tuple[Expert | None, ...]:
        """Those that run trained steps, in the order of steps; None: the one transformer. A pass runs one of them."""
        return tuple(dict.fromkeys(step.expert for step in self.trained_steps))

    def guided(self, step: Step) -> bool:
        """Whether guidance runs at the step: everywhere, or in rollout.guidance_range (Kynkäänniemi et al. 2404.07724)
        and wherever there is noise.
        """
        return (
            self.guidance_range is None
            or step.stochastic
            or self.guidance_range[0] <= step.position < self.guidance_range[1]
        )

    def cheap(self, step: Step) -> bool:
        """Whether the step's passes run in rollout.precision and with rollout.attention: where nothing trains, and no
        log-probability counts.
        """
        cheapens = self.precision is not None or self.attention is not None
        return cheapens and not step.trained and not (step.stochastic and self.fuses)

    @property
    def uncheapened(self) -> "RolloutPlan":
        """The same with all steps run as those that train."""
        return replace(self, precision=None, attention=None)

    def cheap_forwards(self, share: bool = True) -> int:
        """The forwards of a prompt that do; `share` False: where every leaf runs for itself."""
        return sum(step.nodes_in if share else self.leaves for step in self.steps if self.cheap(step))

    def caches(self, step: Step) -> bool:
        """Whether the step may extrapolate its attention:
        nothing after the last stochastic step needs a gradient or a ratio.
        """
        return self.cache is not None and step.index > max(
            (other.index for other in self.steps if other.stochastic), default=-1
        )

    def extrapolates(self, step: Step) -> bool:
        """Whether it does: as many steps as the extrapolation has terms are computed first, of each expert, then every
        `interval`-th.
        """
        if self.cache is None or not self.caches(step):
            return False
        first = next(other.index for other in self.steps if self.caches(other) and other.expert == step.expert)
        place, computed = step.index - first, self.cache.order + 1
        return place >= computed and (place - computed - 1) % self.cache.interval != 0

    def width(self, step: Step) -> int:
        """Leaves below each child of the step."""
        return self.leaves // step.nodes_out

    @property
    def updates(self) -> int:
        """The optimiser updates of the iteration."""
        return len(self.trained_by_update)

    def update_of_leaf(self, leaf: int) -> int:
        """The optimiser update (0 … updates − 1) that trains a leaf's trajectory: leaves in contiguous shares."""
        return leaf * self.updates_per_iteration // self.leaves

    def update_of_edge(self, step: Step, child: int) -> int:
        """An edge trains once, in the update of its first leaf; with `parents`, siblings together, in that of their
        first. With `edges_per_update` the edges of trained steps are drawn for the updates, of every prompt the same.
        """
        first = child - child % step.fanout if self.keep_siblings else child
        if self.edges_per_update is None:
            return self.update_of_leaf(first * self.width(step))
        return self._drawn_updates[step.index][first] if step.trained else 0

    @cached_property
    def _drawn_updates(self) -> dict[int, list[int]]:
        """The update of every child of every trained step: `edges_per_update` edges after each other in a seeded
        order; siblings that are kept together may make it more. Empty where updates are shares of the leaves.
        """
        if self.edges_per_update is None:
            return {}
        drawn = {step.index: [0] * step.nodes_out for step in self.trained_steps}
        together = {step.index: step.fanout if self.keep_siblings else 1 for step in self.trained_steps}
        firsts = [(index, first) for index, each in drawn.items() for first in range(0, len(each), together[index])]
        random.Random(f"edges/{self.seed}/{self.iteration}").shuffle(firsts)
        update, held = 0, 0
        for index, first in firsts:
            if held >= self.edges_per_update:
                update, held = update + 1, 0
            drawn[index][first] = update
            held += together[index]
        return drawn

    def selected_steps(self, prompt: int) -> list[frozenset[int]]:
        """For every leaf of a prompt, the trained steps that its trajectory takes part in:
        a seeded `step_fraction` of them.
        """
        trained = tuple(step.index for step in self.trained_steps)
        if self.step_fraction == 1.0:
            return [frozenset(trained)] * self.leaves
        share = max(1, round_half_up(len(trained) * self.step_fraction))
        return _drawn(trained, min(share, len(trained)), self.leaves, f"steps/{self.seed}/{self.iteration}/{prompt}")

    def kept_edges(self, step: Step, prompt: int, kept_leaf: Callable[[int], bool] | None = None) -> list[bool]:
        """Whether the edge of every child of a trained step trains:
        by plan, by `step_fraction` and (with `kept_leaf`) by pruning.
        """
        selected, width = self.selected_steps(prompt), self.width(step)
        return [
            step.index in selected[child * width]
            and (kept_leaf is None or any(kept_leaf(leaf) for leaf in range(child * width, (child + 1) * width)))
            for child in range(step.nodes_out)
        ]

    @cached_property
    def counts(self) -> Counts:
        """Exact, but for `extreme` pruning, which depends on the rewards:
        there as many leaves as it keeps, spread over the tree.
        """
        trained_edges, passes = (sum(column) for column in zip(*self.trained_by_update, strict=True))
        return Counts(
            leaves=self.leaves,
            rollout_forwards=sum(step.nodes_in for step in self.steps),
            edges=sum(step.nodes_out for step in self.steps),
            trained_edges=trained_edges,
            train_passes=passes,
            unshared_rollout_forwards=self.leaves * len(self.steps),
            unshared_train_passes=trained_edges,
        )

    @cached_property
    def trained_by_update(self) -> list[tuple[int, int]]:
        """(edges, states) of a prompt that each update trains, as `counts` has them all."""
        last = max((update for each in self._drawn_updates.values() for update in each), default=0)
        updates = self.updates_per_iteration if self.edges_per_update is None else last + 1
        edges, states = [0] * updates, [0] * updates
        for step in self.trained_steps:
            kept = self.kept_edges(step, 0, self.countable_leaves)
            of_edges = [(self.update_of_edge(step, child), child) for child in range(step.nodes_out) if kept[child]]
            for update, _ in of_edges:
                edges[update] += 1
            for update, _ in {(update, child // step.fanout) for update, child in of_edges}:
                states[update] += 1
        return list(zip(edges, states, strict=True))

    @property
    def countable_leaves(self) -> Callable[[int], bool] | None:
        """Stand-ins for the leaves that pruning by reward keeps: as many, spread over the tree as far as can be."""
        if self.prune is None or self.prune.kind == "depth":
            return None
        if self.prune.kind == "extreme":
            kept = min(2 * self.prune.keep, self.leaves)
            spread = {index * self.leaves // kept for index in range(kept)}
            return lambda leaf: leaf in spread
        last = self.last_split()
        return lambda leaf: leaf // self.width(last) % last.fanout == 0

    def last_split(self) -> Step:
        """The last step at which trajectories part."""
        return max((step for step in self.steps if step.fanout > 1), key=lambda step: step.index, default=self.steps[0])


def make_plan(
    recipe: Recipe, iteration: int, table: SigmaTable | None = None, splits: Splits | None = None
) -> RolloutPlan:
    """The plan of `iteration` (0-based). `table`: the pipeline's σ table, needed where rollout.shift is null; `splits`:
    where rollout.tree.splits is auto, those of this iteration; without them, those of its probing or, later, of a tree
    that takes the budget. Raises UserError.
    """
    rollout, prune = recipe.rollout, recipe.credit.prune
    if table is None:
        if rollout.shift is None:
            raise UserError(
                "rollout.shift is null: the pipeline's sigma table is needed to plan; set rollout.shift to a number, "
                "or give model.path"
            )
        table = shifted_sigmas(rollout.steps, rollout.shift)
    window = window_steps(rollout.window, rollout.steps, iteration, recipe.run.seed)
    given = _splits(recipe, iteration, splits)
    stochastic = set(window) | set(given)
    fanouts = _fanouts(rollout, given, stochastic)
    roots = _roots(rollout, fanouts, stochastic)
    pruned = pruned_depths(prune, iteration)
    levels = _levels(rollout, table, stochastic)
    takes = history([level.solver for level in levels])
    steps, nodes = [], roots
    for index, (position, sigma, sigma_next, name) in enumerate(levels):
        solver, fanout, expert = SOLVERS[name], fanouts.get(index, 1), expert_at(sigma, table)
        steps.append(
            Step(
                index=index,
                sigma=sigma,
                sigma_next=sigma_next,
                solver=name,
                coefficients=name if solver.start is None or takes[index] else solver.start,
                stochastic=solver.stochastic,
                takes_estimate=takes[index],
                leaves_estimate=takes[index + 1],
                fanout=fanout,
                trained=solver.stochastic and index not in pruned and _trains(recipe, expert),
                nodes_in=nodes,
                nodes_out=nodes * fanout,
                position=position,
                expert=expert,
            )
        )
        nodes *= fanout
    if recipe.update.edges_per_update is None and recipe.update.updates_per_iteration > nodes:
        raise UserError(
            f"update.updates_per_iteration is {recipe.update.updates_per_iteration}: a group has {nodes} leaves; "
            f"write {nodes} or less"
        )
    tree = rollout.tree or Tree(sibling_correlation=0.0)
    return RolloutPlan(
        iteration=iteration,
        window=tuple(window),
        steps=tuple(steps),
        sigma_max=table(1),
        noise_level=rollout.noise_level,
        split_noise_scale=tree.split_noise_scale,
        sibling_correlation=tree.sibling_correlation,
        updates_per_iteration=recipe.update.updates_per_iteration,
        edges_per_update=recipe.update.edges_per_update,
        keep_siblings=recipe.update.partition == "parents",
        step_fraction=recipe.update.step_fraction,
        prune=prune,
        seed=recipe.run.seed,
        guidance_range=rollout.guidance_range,
        cache=rollout.cache,
        precision=rollout.precision,
        attention=rollout.attention,
        fuses=recipe.credit.fusion_beta != 0,
    )


def expert_at(sigma: float, table: SigmaTable) -> Expert | None:
    """The expert that runs a step from σ; None: the model has one transformer."""
    return None if table.boundary is None else "high" if sigma >= table.boundary - _ROUNDING else "low"


def _trains(recipe: Recipe, expert: Expert | None) -> bool:
    return expert is None or recipe.model.trained_experts in ("both", expert)


def check_trained_experts(recipe: Recipe, table: SigmaTable) -> None:
    """Raises UserError for an iteration whose stochastic steps are all of an expert that does not train."""
    rollout, wanted = recipe.rollout, recipe.model.trained_experts
    if wanted == "both":
        return
    mine = [index for index in range(rollout.steps - 1) if expert_at(table(index), table) == wanted]
    tree = rollout.tree
    if tree is not None and tree.splits == "auto":
        raise UserError(
            f"model.trained_experts is {wanted}, and rollout.tree.splits: auto may choose steps of the other, which do "
            "not train: give the splits, or write both"
        )
    splits = set(tree.splits) if tree is not None and isinstance(tree.splits, list) else set()
    for iteration in range(min(recipe.run.iterations, _LOOKED_AT)):
        stochastic = splits.union(window_steps(rollout.window, rollout.steps, iteration, recipe.run.seed))
        trained = stochastic.difference(pruned_depths(recipe.credit.prune, iteration))
        if stochastic and not trained.intersection(mine):
            where = f"runs steps {mine[0]} … {mine[-1]} here" if mine else "runs no step here"
            fix = f"rollout.window.range: [{mine[0]}, {mine[-1] + 1}]" if mine else "both"
            raise UserError(
                f"model.trained_experts is {wanted}, whose expert {where}, and iteration {iteration} has no stochastic "
                f"step among them: write {fix}"
            )


@lru_cache(maxsize=4)
def _drawn(trained: tuple[int, ...], share: int, leaves: int, seed: str) -> list[frozenset[int]]:
    """`share` of the trained steps for every leaf; every step of a plan asks for them again."""
    draw = random.Random(seed)
    return [frozenset(draw.sample(trained, share)) for _ in range(leaves)]


def _splits(recipe: Recipe, iteration: int, chosen: Splits | None) -> Splits:
    tree = recipe.rollout.tree
    if tree is None:
        return ()
    if isinstance(tree.splits, list):
        return tuple(tree.splits)
    search = SplitSearch.of(recipe)
    return search.splits(iteration, None) if search is not None and chosen is None else chosen or ()


def _fanouts(rollout: Rollout, splits: Splits, stochastic: set[int]) -> dict[int, int]:
    if rollout.tree is not None:
        if splits[-1] > rollout.steps - 2:
            raise UserError(
                f"rollout.tree.splits has {splits[-1]}: "
                f"write steps from 0 to {rollout.steps - 2} (the last step is never stochastic)"
            )
        return dict.fromkeys(splits, rollout.tree.fanout)
    if rollout.shared_initial_noise and stochastic:
        return {min(stochastic): rollout.group_size}
    return {}


def _roots(rollout: Rollout, fanouts: dict[int, int], stochastic: set[int]) -> int:
    below = math.prod(fanouts.values())
    if rollout.shared_initial_noise:
        if below != rollout.group_size and (rollout.tree or rollout.group_size > 1):
            if not stochastic:
                raise UserError(
                    "rollout.shared_initial_noise without a stochastic step makes a group of equal pictures: "
                    "give a window, or set it to false"
                )
            raise UserError(
                f"rollout.group_size is {rollout.group_size}: the tree has {below} leaves; write {below}, "
                "or change tree.splits or tree.fanout"
            )
        return 1
    if rollout.group_size % below:
        raise UserError(
            f"rollout.group_size is {rollout.group_size}: without shared noise it must be a multiple of the tree's "
            f"{below} leaves"
        )
    return rollout.group_size // below


class _Level(NamedTuple):
    position: float
    sigma: float
    sigma_next: float
    solver: str


def _levels(rollout: Rollout, table: SigmaTable, stochastic: set[int]) -> list[_Level]:
    """Every step: the table, and after the last stochastic step the compressed tail,
    if there is one.
    """
    total = rollout.steps
    head = total if rollout.tail is None else max(stochastic, default=-1) + 1
    positions = [float(i) for i in range(head + 1)]
    if rollout.tail is not None:
        count = tail_steps(total - head, rollout.tail.compress)
        positions += [head + j * (total - head) / count for j in range(1, count)] + [float(total)]
    sigmas = [table(position) for position in positions]
    solvers = [
        rollout.dynamics if i in stochastic else rollout.tail.solver if rollout.tail and i >= head else PLAIN
        for i in range(len(sigmas) - 1)
    ]
    return [_Level(*level) for level in zip(positions, sigmas, sigmas[1:], solvers, strict=False)]
