"""`flowgrove tune`: which engine settings take a recipe's passes fastest on this machine, written as a recipe that
extends it.

Key after key: the candidates of one are measured in turn, A, B, A, B, …, with the choice for the keys before it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowgrove.device import pick_device
from flowgrove.errors import UserError
from flowgrove.files import write_text
from flowgrove.models.attention import UNSAFE, alone, attention_names, check_attention, missing, use_attention
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.compiling import compile_blocks, leave_uncompiled
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import PRECISIONS, Precision, has_fp8
from flowgrove.models.runner import PassRunner, tokens_per_pass
from flowgrove.passes.allocator import keep_freed_memory
from flowgrove.passes.recordings import Recordings
from flowgrove.plan.planner import make_plan
from flowgrove.recipe.checks import checkpointing_with
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Checkpointing
from flowgrove.setup import Setup
from flowgrove.tuning.checkpointing import settled
from flowgrove.tuning.choosing import Candidate, Choice, Value, choose, reason
from flowgrove.tuning.model_times import keep_times
from flowgrove.tuning.pass_times import Passes, Timed, Work
from flowgrove.tuning.token_budget import room_beside
from flowgrove.tuning.written import given_keys, header, written

# of a backend's velocity or gradient from sdpa's, of its norm; bf16 kernels differ by less, those that quantise or
# cannot train by more
_DIFFERENCE = 0.05
_ALONE = "chosen for the whole process: with it nothing is decoded, scored or encoded beside passes"
_CHEAP_DIFFERENCE = 0.1  # the same of a velocity that neither trains nor has a ratio

Say = Callable[[str], None]


def tune_recipe(
    path: Path, overrides: tuple[str, ...], out: Path | None, with_compile: bool, say: Say,
    with_precision: bool = False, with_checkpointing: bool = False, with_attention: bool = False,
) -> Path:  # fmt: skip
    """Measures and writes `out` (None: NAME_tuned.yaml beside the recipe NAME.yaml), a recipe that extends `path` with
    `overrides` and the engine settings found; keys of `engine` among the overrides stay as given. `with_precision`:
    rollout.precision too, unless the recipe has one; `with_checkpointing`: model.gradient_checkpointing;
    `with_attention`: rollout.attention too, unless the recipe has one. Returns the file. Raises UserError if it exists,
    or if nothing runs here.
    """
    target = out or path.with_name(f"{path.stem}_tuned.yaml")
    if target.exists():
        raise UserError(f"{target} exists: give another file with --out, or remove it")
    keep_freed_memory()  # as a run does
    recipe = load_recipe(path, overrides)
    given = given_keys(recipe, overrides)
    setup = settled(Setup(recipe), pick_device(recipe))
    work, fixed = Work.of(setup), given.pop("engine", {})
    tuner = _Tuner(setup, fixed, work, with_compile)
    choices = []
    # before blocks are compiled, which compiled ones stay
    asked = [tuner.checkpointing] * with_checkpointing + [tuner.rollout_attention] * with_attention
    asked += [tuner.precision] * with_precision
    split = [tuner.split_lengths] * tuner.policy.adapter.splits_texts()
    for measure in (tuner.token_budget, *split, tuner.attention, *asked, tuner.compiled, tuner.cuda_graphs):
        choice = measure()
        if choice.section != "engine" or choice.key not in fixed:
            choices.append(choice)
            say("\n  ".join([f"{choice.section}.{choice.key}: {choice.value}", *choice.lines]))
    target.parent.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(path.resolve(), target.parent.resolve())
    write_text(target, written({"extends": base, **given}, fixed, choices, header(tuner.device, work)))
    tuner.keep(setup, choices, say)  # last: the recipe is there, whatever ends it
    return target


class _Tuner:
    """A recipe's model, measured with one setting after the other. `fixed`: engine keys that are not to be changed."""

    def __init__(self, setup: Setup, fixed: dict[str, Any], work: Work, with_compile: bool) -> None:
        recipe = setup.recipe
        self.setup = setup
        self.recipe, self.fixed, self.work, self.device = recipe, fixed, work, pick_device(recipe)
        self.measures_compile = with_compile and "compile" not in fixed
        plain = {"token_budget": "auto", "attention": "auto", "cuda_graphs": False} | (
            {"compile": False} if with_compile else {}
        )
        # a kernel that is asked for may take no mask
        self._keeps_split = recipe.rollout.attention is not None or "attention" in fixed
        if not self._keeps_split:
            plain["split_lengths"] = False
        engine = recipe.engine.model_copy(update={key: value for key, value in plain.items() if key not in fixed})
        plainly = recipe.model_copy(update={"engine": engine})
        self.policy = Policy.load(plainly, self.device)
        self.runner = PassRunner.of(plainly, self.policy)
        self.passes = Passes(self.policy, self.runner)
        # taken while passes are measured
        self._beside = room_beside(setup, self.policy) if self.device.type == "cuda" else None
        self._processors = dict(getattr(self.policy.transformer, "attn_processors", {}))  # Z-Image tells of none
        self._attention = "sdpa" if engine.attention == "auto" else engine.attention
        self._cheap_attention = recipe.rollout.attention
        self._recomputed = recipe.model.gradient_checkpointing

    @property
    def rows(self) -> int:
        """Rows of a full pass."""
        return max(1, self.runner.budget.tokens // self.passes.tokens)

    def token_budget(self) -> Choice:
        """Powers of two of rows, up to all that an iteration has beside each other."""
        if "token_budget" in self.fixed:
            return Choice("token_budget", self.runner.budget.tokens, [])
        row, sizes = self.passes.tokens, [2**power for power in range(self.work.widest.bit_length())]
        candidates = [Candidate(rows * row, f"{rows} × {row} tokens", self._timed(rows)) for rows in sizes]
        choice = choose("token_budget", candidates, self.work)
        self.runner.budget.resize(cast(int, choice.value))
        return choice

    def split_lengths(self) -> Choice:
        """Every row of a full pass apart from the others, which is the most that different lengths can take."""
        engine, why = self.recipe.engine, None
        if "split_lengths" in self.fixed:
            return Choice("split_lengths", engine.split_lengths, [])
        if self._keeps_split:
            why = "the recipe names a kernel of attention, which may need it as it is"
        elif engine.distributed == "fsdp2" or self.recipe.rollout.cache is not None:
            why = "not for engine.distributed: fsdp2 and rollout.cache"
        elif self.fixed.get("cuda_graphs"):
            why = "not for engine.cuda_graphs: true"
        if why is not None:
            return Choice("split_lengths", self.policy.splits_lengths, [f"not measured: {why}"])
        split = replace(self.policy, splits_lengths=True)
        apart = Passes(split, self.runner, self.rows)

        def measure() -> Timed:
            self.passes.release()
            return apart.timed(self.rows)

        whole = Candidate(False, "padded and masked", self._timed(self.rows))
        choice = choose("split_lengths", [whole, Candidate(True, "every row apart", measure)], self.work)
        if choice.value:
            self.policy, self.passes = split, Passes(split, self.runner)
        return choice

    def attention(self) -> Choice:
        """What can be selected here for this model, trains, and computes what PyTorch's own attention does."""
        if "attention" in self.fixed:
            return Choice("attention", self.recipe.engine.attention, [])
        x, usable = self.passes.states(1), ["sdpa"]
        self._use("sdpa")
        expected = self._differentiated(x)

        def away(name: str) -> float:
            self._use(name)
            return max(_relative(*pair) for pair in zip(self._differentiated(x), expected, strict=True))

        found = [name for name in attention_names() if name != "sdpa" and "hub" not in name]  # a hub's are downloads
        here = [name for name in found if missing(name, self.device) is None]
        notes = [
            f"{name}: left out, its backward has ended runs with an illegal memory access"
            for name in here
            if name in UNSAFE
        ]
        for name, distance in _that_run([name for name in here if name not in UNSAFE], away, notes):
            if distance <= _DIFFERENCE:
                usable.append(name)
                notes += [f"{name}: {_ALONE}"] if alone(name) else []
            else:
                notes.append(f"{name}: left out, its velocity or gradient is not that of sdpa")
        choice = choose(
            "attention",
            [Candidate(name, name, self._timed(self.rows, name)) for name in usable],
            self.work,
            tuple(notes),
        )
        self._attention = str(choice.value)
        self._use(self._attention)
        return choice

    def rollout_attention(self) -> Choice:
        """Another kernel in steps that do not train, unless the recipe has one: of those whose velocity is near that of
        the steps that do, with a backward or without.
        """
        recipe, weights = self.recipe, self.policy.weights
        given = "the recipe has one" if recipe.rollout.attention is not None else None
        if recipe.engine.distributed == "fsdp2":
            given = "not for engine.distributed: fsdp2"
        if given is not None:
            return Choice("attention", recipe.rollout.attention, [f"not measured: {given}"], "rollout")
        x, notes = self.passes.states(1), list[str]()
        candidates = [Candidate(None, "null", self._cheapened(recipe.rollout.precision, None))]
        with torch.no_grad():
            expected = self.passes.velocity(x)

        @torch.no_grad()
        def away(name: str) -> float:
            splits = self.policy.splits_lengths
            check_attention(self.policy.adapter, name, recipe.model, self.device, "rollout.attention", splits)
            weights.cheapen(None, False, name)
            return _relative(Passes(self.policy.cheap(), self.runner).velocity(x), expected)

        found = [name for name in attention_names() if name != self._attention]
        here = [name for name in found if missing(name, self.device, downloads=False) is None]
        for name, distance in _that_run(here, away, notes):
            told = f"its velocity is {distance:.2%} of its norm away"
            if distance <= _CHEAP_DIFFERENCE:
                notes += [f"{name}: {_ALONE}"] if alone(name) else []
                label = f"{name} ({told})"
                candidates.append(Candidate(name, label, self._cheapened(recipe.rollout.precision, name)))
            else:
                notes.append(f"{name}: left out, {told}, and {_CHEAP_DIFFERENCE:.0%} are allowed")
        choice = choose("attention", candidates, self.work, tuple(notes), "rollout")
        self._cheap_attention = cast("str | None", choice.value)
        weights.cheapen(None)
        return choice

    def checkpointing(self) -> Choice:
        """What training passes compute again, of what fits beside all that an iteration keeps."""
        kinds = self._compiled_kinds() if self.measures_compile else checkpointing_with(self.recipe.engine)
        if self.recipe.model.gradient_checkpointing == "offload":  # where nothing else may fit
            kinds = ("offload", *kinds)
        candidates = [Candidate(kind, kind, self._timed(self.rows, checkpointing=kind)) for kind in kinds]
        choice = choose("gradient_checkpointing", candidates, self.work, section="model")
        self._recomputed = cast(Checkpointing, choice.value)
        self._checkpoint(self._recomputed)
        return choice

    def precision(self) -> Choice:
        """Rollouts in 8 bits, unless the recipe has a precision: the forwards of steps that do not train take their
        time, the others that of full precision.
        """
        recipe, why = self.recipe, None
        if recipe.rollout.precision is not None:
            why = "the recipe has one"
        elif recipe.model.dtype == "fp64" or recipe.engine.distributed == "fsdp2":
            why = "not for model.dtype fp64 and engine.distributed: fsdp2"
        elif recipe.model.base_precision is not None:
            why = "the weights are rounded already, by model.base_precision"
        if why is not None:
            return Choice("precision", recipe.rollout.precision, [f"not measured: {why}"], "rollout")
        candidates = [Candidate(None, "null", self._cheapened(None, self._cheap_attention))]
        for precision in PRECISIONS:
            if precision == "int8" or has_fp8(self.device):
                candidates.append(Candidate(precision, precision, self._cheapened(precision, self._cheap_attention)))
        choice = choose("precision", candidates, self.work, section="rollout")
        self.policy.weights.cheapen(None)
        return choice

    def _cheapened(self, precision: Precision | None, attention: str | None) -> Callable[[], Timed]:
        """With these in steps that do not train, compiled as all others."""
        rollout = self.recipe.rollout.model_copy(update={"precision": precision, "attention": attention})
        if not rollout.cheapens:
            return self._timed(self.rows)
        compiled = not self.measures_compile and self.recipe.engine.compile
        search = self.setup.split_search
        changed = self.recipe.model_copy(update={"rollout": rollout})
        plan = make_plan(changed, 0, self.setup.table, None if search is None else search.dear)
        share, counts = self.recipe.engine.share, plan.counts
        forwards = counts.rollout_forwards if share else counts.unshared_rollout_forwards
        part = plan.cheap_forwards(share) / forwards

        def measure() -> Timed:
            self.passes.release()
            full = self.passes.timed(self.rows)
            self.policy.weights.cheapen(precision, compiled, attention)
            cheap = Passes(self.policy.cheap(), self.runner)
            spent = cheap.seconds_per_row(cheap.forward, self.rows)
            return full._replace(forward=full.forward + part * (spent - full.forward))

        return measure

    def compiled(self) -> Choice:
        """torch.compile of the blocks, on request."""
        if not self.measures_compile:
            return Choice("compile", self.recipe.engine.compile, ["not measured: give --compile, which takes minutes"])
        if self._recomputed not in self._compiled_kinds():
            line = "not measured: gradient_checkpointing: selective does not go with it and fsdp2"
            return Choice("compile", False, [f"{line}; give --checkpointing, too"])
        compile_blocks(self.policy.transformer)
        checkpoint_blocks(self.policy.transformer, self._recomputed, True)
        plain = self._timed(self.rows)

        def eager() -> Timed:
            with torch.compiler.set_stance("force_eager"):
                return plain()

        choice = choose("compile", [Candidate(False, "eager", eager), Candidate(True, "compiled", plain)], self.work)
        if not choice.value:  # not by the compiler's stance: what else a run compiles is timed as it runs
            leave_uncompiled(self.policy.transformer)
            self._checkpoint(self._recomputed)
        return choice

    def cuda_graphs(self) -> Choice:
        """The rollout's passes recorded and replayed."""
        if self.device.type != "cuda" or "cuda_graphs" in self.fixed:
            return Choice("cuda_graphs", False, ["not measured: needs a GPU"])
        if self.policy.splits_lengths:
            return Choice("cuda_graphs", False, ["not measured: not for engine.split_lengths: true"])
        launched, recorded = (PassRunner(self.runner.budget, each) for each in (None, Recordings(self.device)))
        candidates = [
            Candidate(False, "launched", lambda: self._rolled(launched)),
            Candidate(True, "recorded", lambda: self._rolled(recorded)),
        ]
        return choose("cuda_graphs", candidates, self.work)

    def _timed(
        self, rows: int, attention: str | None = None, checkpointing: Checkpointing | None = None
    ) -> Callable[[], Timed]:
        def measure() -> Timed:
            self.passes.release()
            if attention is not None:
                self._use(attention)
            if checkpointing is not None:
                self._checkpoint(checkpointing)
            return self.passes.timed(rows)

        return measure

    def _compiled_kinds(self) -> tuple[Checkpointing, ...]:
        return checkpointing_with(self.recipe.engine.model_copy(update={"compile": True}))

    def _checkpoint(self, kind: Checkpointing) -> None:
        """Before compilation is measured, which leaves blocks as the recipe has them."""
        checkpoint_blocks(self.policy.transformer, kind, not self.measures_compile and self.recipe.engine.compile)

    def _rolled(self, runner: PassRunner) -> Timed:
        """Seconds of the rollout's own pass and of a training pass, the first replayed where `runner` records."""
        rows, passes = self.rows, self.passes
        return Timed(
            passes.seconds_per_row(lambda x: passes.roll(runner, x), rows), passes.seconds_per_row(passes.train, rows)
        )

    def keep(self, setup: Setup, choices: list[Choice], say: Say) -> None:
        """Keeps what `flowgrove plan --time` needs of the recipe with these choices, for passes as large as a run's
        with them or without."""

        def chosen(section: str) -> dict[str, Value]:
            return {choice.key: choice.value for choice in choices if choice.section == section}

        engine = self.recipe.engine.model_copy(update=chosen("engine"))
        model = self.recipe.model.model_copy(update=chosen("model"))
        rollout = self.recipe.rollout.model_copy(update=chosen("rollout"))
        self._beside = None  # the optimiser needs its room now
        runner = PassRunner(self.runner.budget, Recordings(self.device) if engine.cuda_graphs else None)
        largest = max(self.rows, tokens_per_pass(self.recipe, self.device.type) // self.passes.tokens)
        tuned = self.recipe.model_copy(update={"engine": engine, "model": model, "rollout": rollout})
        rows = max(1, min(largest, self.work.widest))
        keep_times(setup, tuned, self.policy, runner, self.passes, rows, say)

    def _use(self, attention: str) -> None:
        if self._processors:
            self.policy.transformer.set_attn_processor(dict(self._processors))
        splits = self.policy.splits_lengths
        use_attention(self.policy.adapter, attention, self.recipe.model, self.device, splits)

    def _differentiated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity of states, and the gradient of its product with them."""
        x = x.clone().requires_grad_()
        v = self.passes.velocity(x)
        (gradient,) = torch.autograd.grad(v, x, x.detach().to(v.dtype))
        return v.detach(), gradient


def _that_run(names: list[str], away: Callable[[str], float], notes: list[str]) -> Iterator[tuple[str, float]]:
    """Kernels that take the model's tensors, each with how far `away` it is; `notes` say why others do not."""
    for name in names:
        try:
            yield name, away(name)
        except UserError:  # not for this model
            continue
        except Exception as error:  # whatever a kernel raises that does not take these tensors
            notes.append(f"{name}: {reason(error)}")


def _relative(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors over the norm of the second."""
    return float((found - expected).norm() / expected.norm())
