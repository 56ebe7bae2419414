"""What a run costs: the passes of all of its iterations and evaluations, at the speed of a device."""

from dataclasses import dataclass, replace
from functools import cached_property

from flowgrove.cost.passes import ROLLOUT, Engine, Pass, Passes, passes_of_evaluation, passes_of_iteration
from flowgrove.cost.speeds import Measured, Published, Speeds, flops_of
from flowgrove.data.prompts import prompts_of_run
from flowgrove.device import pick_device, total_memory
from flowgrove.errors import UserError
from flowgrove.machine import device_name
from flowgrove.models.adapter import PIXELS_PER_DECODE
from flowgrove.models.runner import tokens_per_pass
from flowgrove.plan.division import Division
from flowgrove.plan.flops import Flops, count_flops
from flowgrove.plan.identity import Identity, cheap_forward, score_key
from flowgrove.plan.memory import GPU_SHARE
from flowgrove.plan.planner import RolloutPlan
from flowgrove.rates.kept import rates_of
from flowgrove.rates.published import UTILISATION, published
from flowgrove.rewards.registry import is_groupwise, scored_beside
from flowgrove.setup import Setup
from flowgrove.tuning.graph_room import GraphRoom, room_of_cpu
from flowgrove.tuning.token_budget import cache_key, cached_budget

STAGES = ("rollout", "decode", "rewards", "update", "optimiser")


@dataclass(frozen=True)
class Spent:
    """Seconds by stage, None where they are not known, and FLOPs as they run."""

    seconds: dict[str, float | None]
    flops: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of all that is known."""
        return sum(seconds for seconds in self.seconds.values() if seconds is not None)


@dataclass(frozen=True)
class Alike:
    """Iterations of the same plan: the first one's number, how many there are, its window, and what each takes."""

    first: int
    count: int
    window: tuple[int, ...]
    spent: Spent


@dataclass(frozen=True)
class Cheap:
    """Passes of steps that do not train, by the recipe's `keys`. `share`: of a full forward's time that a full one
    takes; None: not measured, so that they are charged as forwards.
    """

    name: str
    keys: tuple[str, ...]
    share: float | None


@dataclass(frozen=True)
class RunTime:
    """What a run takes on one of its ranks, that with the most prompts. `encoding`: seconds of all prompts' texts,
    which are encoded once; `evaluation`: one of `evaluations`, None where its prompts are not on this machine;
    `rests_on`: what each number rests on; `matrix_rate`: FLOPs per second that utilisation is a share of;
    `measures_noise`: whether some iterations measure the gradient's noise; `cheap`: passes of steps that
    do not train, where they run otherwise than the others.
    """

    device: str
    ranks: int
    rows: int
    iterations: list[Alike]
    evaluation: Spent | None
    evaluations: int
    encoding: float | None
    texts: int
    flops: list[Flops]
    rests_on: dict[str, str]
    matrix_rate: float | None
    measures_noise: bool = False
    cheap: Cheap | None = None

    @cached_property
    def iteration(self) -> Spent:
        """An average iteration."""
        count = sum(some.count for some in self.iterations)

        def mean(stage: str) -> float | None:
            parts = [(some.count, some.spent.seconds[stage]) for some in self.iterations]
            known = [number * seconds for number, seconds in parts if seconds is not None]
            return sum(known) / count if len(known) == len(parts) else None

        flops = {
            stage: sum(some.count * some.spent.flops[stage] for some in self.iterations) / count
            for stage in self.iterations[0].spent.flops
        }
        return Spent({stage: mean(stage) for stage in STAGES}, flops)

    @property
    def seconds(self) -> float:
        """Of the whole run, as far as its parts are known."""
        iterations = sum(some.count * some.spent.total for some in self.iterations)
        evaluations = 0.0 if self.evaluation is None else self.evaluations * self.evaluation.total
        return iterations + evaluations + (self.encoding or 0.0)

    @property
    def not_predicted(self) -> list[str]:
        """What is left out of it."""
        missing = [stage for stage in STAGES if self.iteration.seconds[stage] is None]
        missing += ["evaluations"] * (self.evaluation is None) + ["encoding"] * (self.encoding is None)
        missing += ["measuring the gradient's noise"] * self.measures_noise
        if self.cheap is not None:
            missing += [f"what {key} saves" for key in self.cheap.keys if self.cheap.share is None]
            missing += ["measuring rollout_distance"] * bool(self.evaluations)
        return missing + ["what ranks send each other"] * (self.ranks > 1) + ["loading, checkpoints"]

    def utilisation(self, stage: str) -> float | None:
        """The share of the matrix rate at which a stage of an average iteration runs."""
        seconds, flops = self.iteration.seconds[stage], self.iteration.flops.get(stage)
        return flops / seconds / self.matrix_rate if seconds and flops and self.matrix_rate else None


def predict_time(
    setup: Setup, division: Division, device: str | None = None, utilisation: float | None = None
) -> RunTime:
    """What a run of a recipe takes. `device`: a name of the table of published rates, at `utilisation` of them (None:
    the table's); None: this machine's, by what was measured on it. Raises UserError where nothing was, for names that
    are not in the table, and for models without configuration files.
    """
    return _Predictor(setup, division, device, utilisation).run_time()


class _Predictor:
    def __init__(self, setup: Setup, division: Division, name: str | None, utilisation: float | None) -> None:
        recipe = setup.recipe
        self.setup, self.recipe, self.division = setup, recipe, division
        given = None if name is None else published(name)
        here = pick_device(recipe) if given is None else None
        self.kind = "cuda" if here is None else here.type
        rates = None if here is None else rates_of(here)
        self.model = setup.memory(self.kind, division)
        self.flops = count_flops(recipe, self.model)
        if given is not None:
            self.device, memory = given.name, given.memory
            self.speeds: Speeds = Published(given, recipe, UTILISATION if utilisation is None else utilisation)
            budget = None
        elif here is not None and rates is not None:
            self.device, memory = device_name(here), total_memory(here)
            self.speeds = Measured(rates, Identity.of(recipe), self.flops[0], cheap_forward(recipe.rollout))
            auto = recipe.engine.token_budget == "auto" and here.type == "cuda"
            budget = cached_budget(cache_key(recipe, self.device)) if auto else None
        self.tokens = budget or tokens_per_pass(recipe, self.kind)
        self.engine = self._engine(memory)
        self.prompts = max(division.prompts_by_size(recipe), key=self._tokens)

    def _tokens(self, prompts: list[int]) -> int:
        """Of a picture of each of these prompts, whose numbers are those of each size."""
        return sum(some * size.geometry.tokens for some, size in zip(prompts, self.flops, strict=True))

    def _engine(self, memory: int) -> Engine:
        model = self.model

        def fitting() -> int:
            if self.kind == "cpu":
                return room_of_cpu(memory, self.division.ranks) // model.graph
            found = model.at(self.tokens)
            return (int(GPU_SHARE * memory) - found.peak) // found.graph

        room = GraphRoom.asked(self.recipe, bool(model.gathered), fitting)
        full = max(1, self.tokens // max(size.geometry.tokens for size in self.flops)) // model.doubled
        return Engine(
            tokens=self.tokens,
            doubled=model.doubled,
            trained=model.together,
            pixels_per_decode=PIXELS_PER_DECODE[self.kind],
            beside=scored_beside(self.recipe, self.kind),
            whole_groups=any(map(is_groupwise, self.recipe.reward)),
            graphs=lambda: room.graphs(full),
            divided=self.division.shards is not None,
        )

    def run_time(self) -> RunTime:
        groups: dict[RolloutPlan, list[int]] = {}
        for iteration in range(self.recipe.run.iterations):
            plan = self.setup.plan(iteration)
            groups.setdefault(replace(plan, iteration=0), []).append(iteration)
        alike = [
            Alike(numbers[0], len(numbers), plan.window, self._iteration(self.setup.plan(numbers[0])))
            for plan, numbers in groups.items()
        ]
        evaluations, evaluation = self._evaluations()
        texts = self._texts(evaluations)
        seconds = self.speeds.encode(self.flops[0])
        rows = max(1, self.tokens // (self.flops[0].geometry.tokens * self.flops[0].doubled))
        return RunTime(
            device=self.device,
            ranks=self.division.ranks,
            rows=rows,
            iterations=alike,
            evaluation=evaluation,
            evaluations=evaluations,
            encoding=None if seconds is None else seconds * texts,
            texts=texts,
            flops=self.flops,
            rests_on=self.speeds.rests_on | self._guesses(),
            matrix_rate=self.speeds.matrix_rate(),
            measures_noise=self.recipe.run.gradient_noise_every is not None,
            cheap=self._cheap(rows),
        )

    def _cheap(self, rows: int) -> Cheap | None:
        """Cheap passes of so many states."""
        name, rolled = cheap_forward(self.recipe.rollout), self.recipe.rollout
        if name is None:
            return None
        values = {"rollout.precision": rolled.precision, "rollout.attention": rolled.attention}
        keys = tuple(key for key, value in values.items() if value is not None)
        cheap, full = (
            self.speeds.passes(Pass(kind, rows, self.flops[0].doubled), self.flops[0]) for kind in ("cheap", "forward")
        )
        return Cheap(name, keys, cheap / full if self.speeds.knows_cheap else None)

    def _guesses(self) -> dict[str, str]:
        """What passes that nobody has measured are charged as."""
        name, told = cheap_forward(self.recipe.rollout), {}
        if name is not None and not self.speeds.knows_cheap:
            told[name] = "charged as full precision: not measured, which `flowgrove tune` does"
        if self.recipe.rollout.cache is not None:
            told["steps of rollout.cache"] = "charged by the FLOPs that are left of a forward: not measured"
        return told

    def _iteration(self, plan: RolloutPlan) -> Spent:
        sizes = [size.geometry for size in self.flops]
        parts = passes_of_iteration(self.recipe, plan, self.prompts, sizes, self.engine)
        return self._spent(list(zip(parts, self.flops, strict=True)), plan.updates if plan.trained_steps else 0)

    def _evaluations(self) -> tuple[int, Spent | None]:
        """How many there are, and what one takes; None where the held-out prompts are not on this machine."""
        run, flops = self.recipe.run, self.flops[0]
        try:
            held_out = -(-len(self.setup.eval_prompts) // self.division.ranks) if run.eval_every else 0
        except UserError:
            return 0, None
        scale = self.recipe.model.guidance_scale if run.eval.guidance_scale is None else run.eval.guidance_scale
        engine = replace(self.engine, doubled=2 if self.model.adapter.needs_uncond(scale) else 1)
        found = passes_of_evaluation(self.setup.eval_plan, held_out, flops.geometry, engine)
        count = -(-run.iterations // run.eval_every) + 1 if held_out and run.eval_every else 0
        return count, self._spent([(found, flops)], 0)

    def _spent(self, parts: list[tuple[Passes, Flops]], updates: int) -> Spent:
        seconds: dict[str, float | None] = dict.fromkeys(STAGES, 0.0)
        flops = dict.fromkeys(("rollout", "decode", "update"), 0.0)

        def add(stage: str, count: int, each: float | None) -> None:
            before = seconds[stage]
            seconds[stage] = None if before is None or each is None else before + count * each

        for passes, size in parts:
            for one, count in passes.of_transformer.items():
                stage = "rollout" if one.kind in ROLLOUT else "update"
                add(stage, count, self.speeds.passes(one, size))
                flops[stage] += count * flops_of(one, size)
            for samples, count in passes.decodes.items():
                add("decode", count, self.speeds.decode(samples, size))
                flops["decode"] += count * samples * size.decode
            if passes.samples:
                add("rewards", passes.samples, self.speeds.score(score_key(self.recipe, size.geometry.pixels)))
        if updates:
            add("optimiser", updates, self.speeds.update(self.model.sizes.trained))
        return Spent(seconds, flops)

    def _texts(self, evaluations: int) -> int:
        """How many texts a rank encodes, each once."""
        data, run = self.recipe.data, self.recipe.run
        try:
            texts = {*prompts_of_run(self.setup.prompts, run.iterations, data.prompts_per_iteration, run.seed)}
        except UserError:  # a set that is not here: no more than are drawn
            count = run.iterations * data.prompts_per_iteration
        else:
            count = len(texts | {*self.setup.eval_prompts} if evaluations else texts)
        return -(-count // self.division.ranks) + (self.engine.doubled > 1)
