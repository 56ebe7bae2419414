"""What a row of a transformer pass costs: at several batch sizes, eager, recorded as a CUDA graph, with compiled
blocks, with other attention kernels, without masks (engine.split_lengths), and with linear layers in 8 bits
(rollout.precision), which have no backward.

A transformer of few blocks stands for the whole one: with blocks taken out the same pass is timed again, so that the
cost of a block of each kind and of what lies around them come out, and with them the cost of FLUX.1-dev's 19 double and
38 single blocks and of Qwen-Image's 60. Such figures are derived and marked as that.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flowgrove import machine
from flowgrove.bench.engine import REUSED, Row, Say
from flowgrove.bench.models import bench_model
from flowgrove.bench.recipes import bench_recipe
from flowgrove.bench.table import write_columns
from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError
from flowgrove.models.attention import attention_here, attention_names, check_attention, missing, trains_safely
from flowgrove.models.compiling import compile_blocks
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import PRECISIONS, Precision, has_fp8
from flowgrove.models.runner import PassRunner
from flowgrove.passes.recordings import Recordings
from flowgrove.plan.flops import counted
from flowgrove.tuning.pass_times import Passes

COLUMNS = (
    "model", "blocks", "rows", "mode", "tokens", "forward_ms", "train_ms", "forward_tflop", "forward_tflop_per_s",
    "derived", "repeats", "device", "torch", "triton", "compiler", "date",
)  # fmt: skip
ATTENTION = "attention"  # a mode for each kernel that can be selected here
SPLIT = "split"  # without masks, where a model has some; other kernels run so in any case
MODES = (  # in this order: compiled blocks stay compiled
    "eager", "recorded", SPLIT,
    *(f"{precision}{how}" for precision in PRECISIONS for how in ("", "+recorded")),
    "compiled",
    *(f"{precision}+compiled" for precision in PRECISIONS),
)  # fmt: skip
# blocks of published models, by the class of their transformer
WHOLE = {"FluxTransformer2DModel": (19, 38), "QwenImageTransformer2DModel": (60,)}


@dataclass(frozen=True)
class Settings:
    """What is measured: `model` of bench.models, rows of a pass, some of MODES, timed passes of each."""

    device: torch.device
    model: str
    rows: tuple[int, ...]
    modes: tuple[str, ...]
    repeats: int


def settings_of(model: str, rows: str, modes: str | None, repeats: int, device: str) -> Settings:
    """Settings from the options of the command. Raises UserError."""
    place = machine.pick_device(device)
    counts = [word.strip() for word in rows.split(",")]
    if not all(word.isdecimal() and int(word) for word in counts):
        raise UserError(f"--rows is {rows!r}: write whole numbers from 1 up with commas between, like 1,2,4")
    chosen = [word.strip() for word in modes.split(",")] if modes else [*MODES[: 2 if place.type == "cuda" else 1]]
    if ATTENTION in chosen:
        chosen = [mode for mode in chosen if mode != ATTENTION] + attention_here(place)
        if not chosen:
            raise UserError(f"--modes names {ATTENTION}, and no kernel but sdpa's runs here: write eager beside it")
    for mode in chosen:
        if mode in attention_names():
            if (reason := missing(mode, place, downloads=False)) is not None:
                raise UserError(f"--modes names {mode}: {reason}; or leave it out")
        elif mode not in MODES:
            raise UserError(
                f"--modes names {mode}: write some of {', '.join(MODES)}, {ATTENTION}, or one of its kernels"
            )
        if "recorded" in mode and place.type != "cuda":
            raise UserError(f"--modes names {mode}, which are CUDA recordings: leave it out, or measure on a GPU")
        if "fp8" in mode and not has_fp8(place):
            raise UserError(f"--modes names {mode}: {place.type} devices like this one have no float8: leave it out")
    return Settings(place, model, tuple(map(int, counts)), tuple(chosen), repeats)


def bench_rows(settings: Settings, say: Say, out: Path | None = None) -> list[Row]:
    """Milliseconds per row, forward and with backward, as COLUMNS name them; with `out`, a CSV there."""
    where = {key: value for key, value in machine.describe(settings.device).items() if key in COLUMNS}
    found: list[Row] = []
    with bench_model(settings.model, settings.device) as model, TemporaryDirectory() as folder:
        recipe = bench_recipe(model, 1, {"group_size": 16}, {"device": settings.device.type, **REUSED.engine})
        data = recipe.data.model_copy(update={"embedding_cache": folder})  # so that no encoder is loaded
        policy = Policy.load(recipe.model_copy(update={"data": data}), settings.device)
        splits = policy.adapter.splits_texts()
        unmasked = replace(policy, splits_lengths=splits)
        runner = PassRunner.of(recipe, policy)
        timer = _Timer(policy, runner, settings.repeats)
        kernels = tuple(mode for mode in settings.modes if mode not in MODES)
        for mode in (mode for mode in (*MODES[:1], *kernels, *MODES[1:]) if mode in settings.modes):
            one = timer
            if mode == SPLIT:
                if not splits:
                    say(f"{mode} is left out: {recipe.model.adapter} has no mask to leave out")
                    continue
                one = _Timer(unmasked, runner, settings.repeats, timer.tflop)
            elif mode in kernels:
                try:
                    check_attention(policy.adapter, mode, recipe.model, settings.device, "--modes", splits)
                except UserError as error:  # not for this model
                    say(f"{mode} is left out: {error}")
                    continue
                policy.weights.cheapen(None, attention=mode)
                trains = trains_safely(mode)
                one = _Timer(unmasked.cheap(), runner, settings.repeats, timer.tflop, trains=trains)
            elif mode == "compiled":
                compile_blocks(policy.transformer)
            elif (precision := precision_of(mode)) is not None:
                policy.weights.cheapen(precision, compiled="compiled" in mode)
                one = _Timer(policy.cheap(), runner, settings.repeats, timer.tflop)
            for rows in settings.rows:
                try:
                    lines = one.lines(mode, rows)
                except Exception as error:  # whatever a kernel raises that does not take these tensors
                    if mode not in kernels:
                        raise
                    say(f"{mode} is left out: {' '.join(str(error).split())[:150]}")
                    break
                found += [{"model": settings.model, **line, "repeats": settings.repeats, **where} for line in lines]
                _write(found, settings, out)  # what has been measured stays if what comes next is stopped
                say("; ".join(f"{line['blocks']} blocks, {rows} rows, {mode}: {_told(line)}" for line in lines))
    if (path := _write(found, settings, out)) is not None:
        say(f"wrote {path}")
    return found


def _write(found: list[Row], settings: Settings, out: Path | None) -> Path | None:
    """The CSV in `out`, so far."""
    if out is None:
        return None
    path = out / f"{machine.file_stem(f'rows_{settings.model}', settings.device)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_columns(found, COLUMNS, path)
    return path


def _told(line: Row) -> str:
    if line["forward_ms"] is None:
        return "no room"
    train = "" if line["train_ms"] is None else f", {line['train_ms']:.2f} with backward"
    return f"{line['forward_ms']:.2f} ms a row{train}"


def precision_of(mode: str) -> Precision | None:
    """The rollout.precision of a mode."""
    return next((precision for precision in PRECISIONS if mode.startswith(precision)), None)


class _Timer:
    """Times a policy's passes. `tflop`: of a row's forward; None: counted here. `trains`: whether they have a backward
    that can be trusted.
    """

    def __init__(
        self, policy: Policy, runner: PassRunner, repeats: int, tflop: float | None = None, trains: bool = True
    ) -> None:
        self.policy, self.repeats, self.passes, self.trains = policy, repeats, Passes(policy, runner), trains
        self.lists = [
            blocks
            for name in ("transformer_blocks", "single_transformer_blocks")
            if (blocks := getattr(policy.adapter.transformer, name, None)) is not None
        ]
        self.sizes = [len(blocks) for blocks in self.lists]
        self.tflop = self._counted() if tflop is None else tflop

    def _counted(self) -> float:
        return counted(lambda: self.passes.forward(self.passes.states(1))).get_total_flops() / 1e12

    def lines(self, mode: str, rows: int) -> list[Row]:
        """The model as it is; and of a published one with fewer blocks, the whole as its blocks make it."""
        whole = self._milliseconds(mode, rows)
        found = [self._line(self.sizes, mode, rows, whole)]
        published = WHOLE.get(type(self.policy.adapter.transformer).__name__)
        if whole is None or published is None or min(self.sizes) < 2:
            return found
        total = whole.copy()
        for place, size in enumerate(self.sizes):
            with _cut(self.lists[place], 1):
                fewer = self._milliseconds(mode, rows)
            if fewer is None:
                return found
            total += (published[place] - size) * (whole - fewer) / (size - 1)
        total[total <= whole] = np.nan  # passes that wait for the host cost no more with more blocks
        return found if np.isnan(total).all() else [*found, self._line(published, mode, rows, total, derived=True)]

    def _line(
        self, blocks: Sequence[int], mode: str, rows: int, spent: NDArray[np.float64] | None, *, derived: bool = False
    ) -> Row:
        forward, train = (
            (None, None) if spent is None else (None if np.isnan(value) else float(value) for value in spent)
        )
        return {
            "blocks": "+".join(map(str, blocks)), "rows": rows, "mode": mode, "tokens": self.passes.tokens,
            "forward_ms": forward, "train_ms": train, "forward_tflop": None if derived else self.tflop,
            "forward_tflop_per_s": None if derived or forward is None else 1e3 * self.tflop / forward,
            "derived": derived,
        }  # fmt: skip

    def _milliseconds(self, mode: str, rows: int) -> NDArray[np.float64] | None:
        """(forward, forward and backward) of a row; None where the memory is too small.
        A recorded pass has no backward, nor has one in 8 bits, nor with every kernel of attention.
        """
        try:
            if "recorded" in mode or precision_of(mode) is not None or not self.trains:
                run = self._recorded() if "recorded" in mode else self.passes.forward
                return 1e3 * np.array([self.passes.seconds_per_row(run, rows, self.repeats), np.nan])
            return 1e3 * np.array(self.passes.timed(rows, self.repeats))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            self.passes.release()

    def _recorded(self) -> Callable[[torch.Tensor], object]:
        recordings = Recordings(self.policy.device)

        def forward(x: torch.Tensor) -> list[torch.Tensor | None]:
            return [self.passes.velocity(x)]

        return lambda x: recordings("forward", forward, [x])


@contextmanager
def _cut(blocks: nn.ModuleList, count: int) -> Iterator[None]:
    """Inside, the first `count` blocks alone."""
    removed: list[Any] = list(blocks)[count:]
    del blocks[count:]
    try:
        yield
    finally:
        blocks.extend(removed)
