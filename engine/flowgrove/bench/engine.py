"""The engine benchmark: an iteration of the published loop, and of Flowgrove with each lever added in turn, in one
interleaved run.

The published loop is the authors' own batch and sharing, with the step, log-probability and loss in eager PyTorch:
DanceGRPO, MixGRPO and BranchGRPO run a row at a time, Flow-GRPO eight; BranchGRPO's rollout computes a state once for
all that share it, as Flowgrove does, but its training runs every edge for itself. Against it stand two factors whose
product is the speed-up: fewer rows, which holds for any model, and cheaper rows (fuller passes, fused ops, the
rollout's forward reused), which a model that one row fills has less of. Beside the seconds stands what the counted
passes should take at the time of a row in passes of the lever's size, measured right before, so that a lever that saves
less than its passes shows.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowgrove import machine
from flowgrove.bench.models import bench_model
from flowgrove.bench.recipes import LEAVES, LENGTHS, RECIPES, bench_prompts, bench_recipe, bench_rewards
from flowgrove.bench.table import write_columns, write_results
from flowgrove.device import pick_backend
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models.attention import check_attention, takes_no_mask
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import PRECISIONS, Precision, check_precision
from flowgrove.models.runner import PassRunner
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.passes.budget import PassBudget
from flowgrove.passes.recordings import Recordings
from flowgrove.recipe.schema import Checkpointing, Recipe
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.spans import span_totals
from flowgrove.tuning.graph_room import NO_ROOM, GraphRoom
from flowgrove.tuning.pass_times import Passes, Timed, Work
from flowgrove.update.updater import Updater

COLUMNS = (
    "model", "recipe", "prompts", "lever", "rows_per_pass", "rollout_forwards", "train_passes",
    "rows_speedup", "per_row_speedup", "speedup", "predicted_speedup", "rows_over_dance", "over_dance",
    "seconds", "plan_s", "rollout_s", "reward_s", "credit_s", "update_s", "transformer_s", "decode_s",
    "percent_outside", "predicted_s", "row_forward_s", "row_train_s", "samples_per_second", "peak_memory_bytes",
    "rounds", "device", "threads", "torch", "triton", "compiler", "date",
)  # fmt: skip


class Published(NamedTuple):
    """How the authors' loop runs an algorithm: `rows` of a pass, and whether its rollout `shares` states.

    Its training runs every edge for itself.
    """

    rows: int = 1
    shares: bool = False


# branch_mix_flash and grove, which nobody published, as BranchGRPO's loop would run them; Flow-GRPO's configurations
# say 8 to 16
PUBLISHED = {
    "dance": Published(),
    "flow": Published(rows=8),
    "flow_fast": Published(rows=8),
    "mix": Published(),
    "mix_flash": Published(),
    "branch": Published(shares=True),
    "branch_mix": Published(shares=True),
    "branch_mix_flash": Published(shares=True),
    "grove": Published(shares=True),
}


class Lever(NamedTuple):
    """What is switched on besides the levers before it, as the whole `engine` section of the recipe.

    `paced`: passes of the published loop's size; `alone`: states shared where that loop shares them and nowhere else;
    `precision` and `attention`: those of `rollout`.
    """

    name: str
    engine: dict[str, Any]
    paced: bool = False
    alone: bool = False
    precision: Precision | None = None
    attention: str | None = None
    checkpointing: Checkpointing = "none"

    @classmethod
    def cheap(cls, precision: Precision | None, attention: str | None, engine: dict[str, Any]) -> "Lever":
        """Steps that do not train in 8 bits, with another attention, or both."""
        name = " ".join(one for one in (precision, attention) if one is not None)
        return cls(f"+ {name}{CHEAP}", engine, precision=precision, attention=attention)

    @property
    def cheapens(self) -> bool:
        """Whether steps that do not train have passes of their own."""
        return self.precision is not None or self.attention is not None

    @property
    def retains(self) -> bool:
        """Whether its rollouts may retain graphs."""
        return not self.alone and self.engine.get("reuse_rollout_graph", True)

    def stages(
        self, recipe: Recipe, published: Published, policy: Policy, runner: PassRunner, rewards: Rewards,
        room: GraphRoom | None = None,
    ) -> Stages:  # fmt: skip
        """The stages of `recipe` with this lever, in passes of `policy_of` it and `runner`; an optimiser of their own.
        `room`: for graphs, if it retains any; None: predicted here.
        """
        policy = self.policy_of(policy)
        rollout = update = self.engine
        if self.alone:
            unshared = {**self.engine, "share": False, "reuse_rollout_graph": False}
            rollout, update = {**unshared, "share": published.shares}, unshared
        updater = Updater(_with(recipe, update), policy, runner)
        cheap = {"precision": self.precision, "attention": self.attention}
        rolled = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=cheap)})
        return Stages(Setup(_with(rolled, rollout)), policy, updater, rewards, room if self.retains else NO_ROOM)

    def policy_of(self, policy: Policy) -> Policy:
        """`policy`, which runs the rows of a pass as this lever says."""
        return replace(policy, splits_lengths=self.engine.get("split_lengths", False))

    def set_budget(self, published: Published, policy: Policy, budget: PassBudget, texts: list[str], own: int) -> int:
        """Makes passes as large as the lever wants them, `own` tokens or the published loop's rows.

        Returns the most rows of one in the rollout of `texts`, 16 pictures each.
        """
        if not self.paced:
            budget.resize(own)
            return min(budget.rows, LEAVES * len(texts))
        budget.resize(published.rows * int(self.policy_of(policy).encode(texts).tokens.max()))
        return published.rows


CHEAP = " rollouts"  # how such levers' names end
LOOP = Lever("published loop", {"backend": "reference"}, paced=True, alone=True)
REUSED = Lever("+ reused graphs", {})
LEVERS = (
    LOOP,
    Lever("+ fused ops", {}, paced=True, alone=True),
    Lever("+ full batches", {}, alone=True),
    Lever("+ shared states", {"reuse_rollout_graph": False}),
    REUSED,
)
GRAPHS = Lever("+ CUDA graphs", {"cuda_graphs": True})
COMPILED = Lever("+ compiled blocks", {"compile": True})
SPLIT = Lever("+ split lengths", {"split_lengths": True})
CHECKPOINTED = tuple(Lever(f"{kind} checkpointing", {}, checkpointing=kind) for kind in ("full", "selective"))
CHOICES = ("all", "ends", "published", "ours")

_REPEATS = 3  # of a pass whose rows are timed
_LONG = 0.5  # seconds of a pass, forward and backward, from which it is timed once
# the iteration in which a process does what it does once
_SHORT = {"steps": 3, "group_size": 2, "window": {"strategy": "all"}}
Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured: `model` of bench.models, recipes by name with one of CHOICES each, iterations timed of each.

    `compiled`: the lever that takes minutes to warm up too; `precision` and `attention`: those of rollouts, each alone
    and both together; `checkpointed`: those that compute activations again too.
    """

    device: torch.device
    model: str
    recipes: dict[str, str]
    prompts: int
    rounds: int
    compiled: bool = False
    precision: Precision | None = None
    checkpointed: bool = False
    attention: str | None = None

    def levers(self, choice: str, splits: bool = False) -> tuple[Lever, ...]:
        """all: on a GPU with CUDA graphs, and where a model `splits` texts by lengths that; ends: the published loop
        and the last default lever; published, ours: one of these. Compiled blocks without CUDA graphs, beside ours, and
        cheap rollouts, without masks where their attention takes none; checkpoints before ours."""
        recorded = [GRAPHS] if self.device.type == "cuda" else []
        chosen = {"all": (*LEVERS, *recorded), "ends": (LOOP, REUSED), "published": (LOOP,), "ours": (REUSED,)}[choice]
        if choice == "published":
            return chosen
        if self.checkpointed:
            ours = chosen.index(REUSED)
            chosen = (*chosen[:ours], *CHECKPOINTED, *chosen[ours:])
        split = [SPLIT] if splits and choice == "all" else []
        return (*chosen, *split, *([COMPILED] if self.compiled else []), *self._cheap(splits))

    def _cheap(self, splits: bool) -> Iterator[Lever]:
        engine = COMPILED.engine if self.compiled else {}
        unmasked = splits and self.attention is not None and takes_no_mask(self.attention)
        beside = {**engine, **(SPLIT.engine if unmasked else {})}
        if self.precision is not None:
            yield Lever.cheap(self.precision, None, engine)
        if self.attention is not None:
            yield Lever.cheap(None, self.attention, beside)
        if self.precision is not None and self.attention is not None:
            yield Lever.cheap(self.precision, self.attention, beside)


def settings_of(
    model: str, recipes: str, levers: str, prompts: int, rounds: int, compiled: bool, device: str,
    precision: str | None = None, checkpointed: bool = False, attention: str | None = None,
) -> Settings:  # fmt: skip
    """Settings from the options of the command; a recipe may name its levers: dance:published. Raises UserError."""
    if levers not in CHOICES:
        raise UserError(f"--levers is {levers}: write one of {', '.join(CHOICES)}")
    chosen: dict[str, str] = {}
    for word in recipes.split(","):
        name, _, choice = word.strip().partition(":")
        if name not in RECIPES:
            raise UserError(f"--recipes names {name}: write some of {', '.join(RECIPES)}")
        if choice and choice not in CHOICES:
            raise UserError(f"--recipes asks for {name}:{choice}: write one of {', '.join(CHOICES)} behind the colon")
        if name in chosen:
            raise UserError(f"--recipes names {name} twice: write it once, behind a colon one of {', '.join(CHOICES)}")
        chosen[name] = choice or levers
    place = machine.pick_device(device)
    if precision is not None and precision not in PRECISIONS:
        raise UserError(f"--precision is {precision}: write {' or '.join(PRECISIONS)}, or leave it out")
    if precision is not None:
        check_precision(precision, place)
    return Settings(place, model, chosen, prompts, rounds, compiled, precision, checkpointed, attention)


def bench_engine(settings: Settings, say: Say, out: Path | None = None) -> list[Row]:
    """Measures everything and returns rows as COLUMNS names them; with `out`, a CSV and a bar chart there."""
    keep_freed_memory()
    rows: list[Row] = []
    with bench_model(settings.model, settings.device) as model:
        bench = _Bench(model, settings, say)
        planned = {name: bench.planned(name) for name in settings.recipes}
        for name, choice in settings.recipes.items():
            rows += bench.recipe(name, choice)
            compare(rows, planned)
            if out is not None:  # a recipe may take minutes: what has been measured stays if the next one is stopped
                out.mkdir(parents=True, exist_ok=True)
                write_columns(
                    rows, COLUMNS, out / f"{machine.file_stem(f'engine_{settings.model}', settings.device)}.csv"
                )
    if out is not None:
        from flowgrove.bench.engine_plot import plot_engine

        say(
            write_results(
                rows, COLUMNS, plot_engine, out / machine.file_stem(f"engine_{settings.model}", settings.device)
            )
        )
    return rows


def _with(recipe: Recipe, engine: dict[str, Any]) -> Recipe:
    """`recipe` with these keys of its `engine` section."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})


def compare(rows: list[Row], planned: dict[str, tuple[int, int]]) -> None:
    """Adds the ratios. Rows cost what they do in passes of the recipe's last lever.

    `planned`: the rows of each recipe's published loop, (rollout, training), as its plan counts them; they stand in
    where that loop was not run, and what its seconds would be divided by is None.
    """
    loops = {row["recipe"]: row for row in rows if row["lever"] == LOOP.name}
    last = {row["recipe"]: row for row in rows if not row["lever"].endswith(CHEAP)}  # of one row at one cost
    dance = loops.get("dance")
    for row in rows:
        loop, final = loops.get(row["recipe"]), last[row["recipe"]]
        cost = Timed(final["row_forward_s"], final["row_train_s"])
        mine = _cost(_counts(row), cost)
        row["rows_speedup"] = _cost(planned[row["recipe"]] if loop is None else _counts(loop), cost) / mine
        row["speedup"] = None if loop is None else loop["seconds"] / row["seconds"]
        row["per_row_speedup"] = None if loop is None else row["speedup"] / row["rows_speedup"]
        row["predicted_speedup"] = None if loop is None else loop["predicted_s"] / row["predicted_s"]
        row["over_dance"] = None if dance is None else dance["seconds"] / row["seconds"]
        row["rows_over_dance"] = None if dance is None else _cost(_counts(dance), cost) / mine


def _counts(row: Row) -> tuple[float, float]:
    return row["rollout_forwards"], row["train_passes"]


def _cost(counts: tuple[float, float], row: Timed) -> float:
    """Seconds of (forwards, train passes)."""
    return counts[0] * row.forward + counts[1] * row.train


class _Bench:
    """One model, which all recipes and levers train in turn."""

    def __init__(self, model: dict[str, Any], settings: Settings, say: Say) -> None:
        self.model, self.settings, self.say, self.device = model, settings, say, settings.device
        self.texts = bench_prompts(settings.prompts)
        self.lengths = min(settings.prompts, LENGTHS)
        first = self._recipe(next(iter(settings.recipes)))
        self.policy = Policy.load(_with(first, COMPILED.engine) if settings.compiled else first, self.device)
        self.runner = PassRunner.of(first, self.policy)
        self.own, self.splits = self.runner.budget.tokens, self.policy.adapter.splits_texts()
        if settings.attention is not None:
            check_attention(
                self.policy.adapter, settings.attention, first.model, self.device, "--attention", self.splits
            )
        self.cheapened: Lever | None = None  # whose copy of the transformer there is
        self.rewards, self.passes = bench_rewards(first, self.device), Passes(self.policy, self.runner)
        self.warm: set[str] = set()  # levers that keep nothing per shape, and have run
        short = bench_recipe(model, settings.prompts, _SHORT, {"device": self.device.type})
        stages = LOOP.stages(short, Published(), self.policy, self.runner, self.rewards)
        with self._ready(LOOP, Published(), stages):
            stages.run(self.texts, 0)

    def planned(self, name: str) -> tuple[int, int]:
        """Rows of the published loop, (rollout, training)."""
        recipe = self._recipe(name)
        shared, alone = (Work.of(Setup(_with(recipe, {"share": share}))) for share in (True, False))
        return (shared if PUBLISHED[name].shares else alone).forwards, alone.passes

    def recipe(self, name: str, choice: str) -> list[Row]:
        """The chosen levers in turn, `rounds` times, each beside the time of a row in its kind of pass.

        Levers with passes of our own size warm up in a round before; if not all are measured, since an iteration then
        is long, the default one does once for all recipes, as it keeps nothing per shape.
        """
        levers = self.settings.levers(choice, self.splits)
        published, rounds = PUBLISHED[name], self.settings.rounds
        recipe = self._recipe(name)
        # no lever changes what the room is predicted from, and predicting takes seconds that no iteration may count
        room = self._room(recipe) if any(lever.retains for lever in levers) else NO_ROOM
        recorded = PassRunner(self.runner.budget, Recordings(self.device))
        stages = {
            lever.name: lever.stages(
                recipe, published, self.policy, recorded if lever == GRAPHS else self.runner, self.rewards, room
            )
            for lever in levers
        }
        for lever in levers:
            if not lever.paced and (choice == "all" or lever.name not in self.warm):
                with self._ready(lever, published, stages[lever.name]):
                    stages[lever.name].run(self.texts, 0)
                if lever == REUSED or lever.cheapens:
                    self.warm.add(lever.name)
        self.say(f"{name}: warm")
        found: dict[str, list[Row]] = {lever.name: [] for lever in levers}
        for number in range(rounds):
            for lever in levers:
                found[lever.name].append(self._iteration(lever, published, stages[lever.name]))
            self.say(f"{name}: round {number + 1} of {rounds}")
        what = {"model": self.settings.model, "recipe": name, "prompts": self.settings.prompts, "rounds": rounds}
        return [{**_median(each), **what, **machine.describe(self.device)} for each in found.values()]

    def _room(self, recipe: Recipe) -> GraphRoom:
        """For graphs beside passes of our own size."""
        self.runner.budget.resize(self.own)
        with _stance(compiled=False):
            return GraphRoom.of(Setup(recipe), self.policy, self.runner)

    def _recipe(self, name: str) -> Recipe:
        rollout = {"group_size": LEAVES, **RECIPES[name]}
        return bench_recipe(self.model, self.settings.prompts, rollout, {"device": self.device.type})

    @contextmanager
    def _ready(self, lever: Lever, published: Published, stages: Stages) -> Iterator[int]:
        """Inside, `stages` run as the lever wants them; yields the rows of a pass."""
        rows = lever.set_budget(published, self.policy, self.runner.budget, self.texts, self.own)
        if lever.cheapens and lever != self.cheapened:
            self.policy.weights.cheapen(lever.precision, lever.engine.get("compile", False), lever.attention)
            self.cheapened = lever
        checkpoint_blocks(self.policy.transformer, lever.checkpointing, stages.recipe.engine.compile)
        # on a GPU the rounding of activations is compiled, whether the blocks are or not
        with pick_backend(stages.recipe), _stance(bool(stages.recipe.engine.compile) or lever.precision is not None):
            yield rows

    def _iteration(self, lever: Lever, published: Published, stages: Stages) -> Row:
        with self._ready(lever, published, stages) as rows:
            policy = lever.policy_of(self.policy)
            passes = Passes(policy, self.runner, self.lengths) if policy.splits_lengths else self.passes
            per_row = _row_times(passes, rows)
            if lever.cheapens:
                cheap = Passes(policy.cheap(), self.runner, self.lengths)
                per_row = per_row._replace(forward=_mixed(cheap, rows, per_row.forward, stages))
            passes.release()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            with span_totals(self.device) as totals:
                line = stages.run(self.texts, 0)
        return {"lever": lever.name, "rows_per_pass": rows, **_row(line, totals.seconds, per_row)}


def _row_times(passes: Passes, rows: int) -> Timed:
    once = passes.timed(rows)
    return once if rows * sum(once) >= _LONG else passes.timed(rows, _REPEATS)


def _mixed(cheap: Passes, rows: int, full: float, stages: Stages) -> float:
    """Seconds of an average forward of a row, of which some are `cheap`; `full`: of one that is not."""
    plan, share = stages.sizes[0][1].first_plan, stages.recipe.engine.share
    spent = cheap.seconds_per_row(cheap.forward, rows, _REPEATS)
    forwards = plan.counts.rollout_forwards if share else plan.counts.unshared_rollout_forwards
    return full + (spent - full) * plan.cheap_forwards(share) / forwards


def _stance(compiled: bool) -> AbstractContextManager[None]:
    """One policy serves all levers: where it has compiled blocks,
    those run uncompiled in here unless they are wanted.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("default" if compiled else "force_eager")
    return stance


def _row(line: dict[str, Any], totals: dict[str, float], per_row: Timed) -> Row:
    seconds = sum(line["seconds"].values())
    transformer = totals.get("transformer", 0.0) + totals.get("backward", 0.0)
    return {
        "rollout_forwards": line["rollout_forwards"],
        "train_passes": line["train_passes"],
        "seconds": seconds,
        **{f"{stage}_s": spent for stage, spent in line["seconds"].items()},
        "transformer_s": transformer,
        "decode_s": totals.get("decode", 0.0),
        "percent_outside": 100 * (1 - transformer / seconds),
        "predicted_s": _cost((line["rollout_forwards"], line["train_passes"]), per_row),
        "row_forward_s": per_row.forward,
        "row_train_s": per_row.train,
        "samples_per_second": line["samples_per_second"],
        "peak_memory_bytes": line["peak_memory_bytes"],
    }


def _median(rounds: list[Row]) -> Row:
    return {
        key: value if isinstance(value, str) else statistics.median(row[key] for row in rounds)
        for key, value in rounds[0].items()
    }
