"""What the memory of an iteration holds from moment to moment: every allocation of the trace, by the phase that made it
and by when it was freed.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowgrove.bench.table import write_columns
from flowgrove.models.policy import Policy
from flowgrove.profiler.events import Event, Trace
from flowgrove.spans import DECODE, OPS, OPTIMIZER, REWARD, TRANSFORMER
from flowgrove.update.updater import Updater

WEIGHTS, OPTIMISER, GRADIENTS, ACTIVATIONS, GRAPHS, LATENTS, PICTURES, OTHER = KINDS = (
    "weights", "optimiser", "gradients", "activations", "retained graphs", "latents", "pictures", "other",
)  # fmt: skip
_POINTS = 1500  # of the timeline that is written and drawn
_TYPES = {"cpu": 0, "cuda": 1}  # as the profiler numbers them
_NEVER = float("inf")


@dataclass(frozen=True)
class Timeline:
    """`seconds` [n] from `origin` on, a time of the trace in microseconds; `bytes_of`: int64 [n] by kind, thinned so
    that peaks stay. `peak`: bytes at the fullest moment, which holds `at_peak` of each kind; `peaks`: each kind's own.
    `told`: the peak by the allocator's own total.
    """

    origin: float
    seconds: NDArray[np.float64]
    bytes_of: dict[str, NDArray[np.int64]]
    peak: int
    at_peak: dict[str, int]
    peaks: dict[str, int]
    told: int

    def write(self, path: Path) -> None:
        """A CSV with a line per moment, its columns seconds and the bytes of every kind."""
        columns = ("seconds", *KINDS)
        moments = zip(self.seconds.tolist(), *(self.bytes_of[kind].tolist() for kind in KINDS), strict=True)
        rows = [dict(zip(columns, moment, strict=True)) for moment in moments]
        write_columns([{**row, "seconds": round(row["seconds"], 6)} for row in rows], columns, path)


def size_of(count: int) -> str:
    """Bytes as they are read."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def held(policy: Policy, updater: Updater) -> dict[str, int]:
    """Bytes on the policy's device of what stays between iterations: weights (the transformer, its masters, average and
    untouched copy, the VAE, text encoders that stay) and the optimiser's state; on a GPU, as `other`, what else the
    allocator has given out.
    """
    pipe = policy.adapter.pipe
    modules = [policy.transformer, policy.weights.reference_copy, *getattr(pipe, "components", {}).values()]
    weights: list[Tensor] = [*policy.weights.trainable().values()]
    for module in modules:
        if isinstance(module, nn.Module):
            weights += [*module.parameters(), *module.buffers()]
    weights += policy.weights.initial.values()
    if updater.ema is not None:
        weights += updater.ema.average.values()
    states = (value for state in updater.optimizer.state.values() for value in state.values())
    optimiser = [value for value in states if isinstance(value, Tensor)]
    found = {WEIGHTS: _bytes(weights, policy.device), OPTIMISER: _bytes(optimiser, policy.device)}
    if policy.device.type == "cuda":
        found[OTHER] = max(0, torch.cuda.memory_allocated(policy.device) - sum(found.values()))
    return found


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Of their storages on the device, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type == device.type)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def timeline(trace: Trace, base: Mapping[str, int], kinds: Mapping[str, str], device: torch.device) -> Timeline:
    """`base`: bytes by kind before the trace (see `held`); `kinds`: of every phase, the kind of its ranges."""
    events = sorted(_told(trace.events, device), key=lambda event: event["ts"])
    names = _Kinds(trace, kinds)
    count = len(events)
    delta = np.zeros((count + 1, len(KINDS)), dtype=np.int64)
    delta[0] = [base.get(kind, 0) for kind in KINDS]
    for number, kind, size in names.changes(events):
        delta[number + 1, KINDS.index(kind)] += size
    level = np.cumsum(delta, axis=0)
    times = np.array([events[0]["ts"] if events else 0.0, *(event["ts"] for event in events)])
    total = level.sum(1)
    fullest = int(total.argmax())
    kept = _thinned(total)
    return Timeline(
        origin=float(times[0]),
        seconds=(times[kept] - times[0]) / 1e6,
        bytes_of={kind: level[kept, column] for column, kind in enumerate(KINDS)},
        peak=int(total[fullest]),
        at_peak=dict(zip(KINDS, level[fullest].tolist(), strict=True)),
        peaks=dict(zip(KINDS, level.max(0).tolist(), strict=True)),
        told=sum(base.values()) + _rise(events),
    )


def _told(events: list[Event], device: torch.device) -> Iterable[Event]:
    """What the allocator of the device has told."""
    wanted = _TYPES[device.type]
    number = -1 if wanted == 0 else device.index
    for event in events:
        args = event["args"] if event["name"] == "[memory]" else {}
        if args.get("Device Type") == wanted and number in (None, args["Device Id"]):
            yield event


def _rise(events: list[Event]) -> int:
    """By how much the allocator's own total rose over that before the first event."""
    if not events:
        return 0
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in events) - before)


def _thinned(total: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of every stretch of moments the fullest, and the first and the last of all."""
    parts = np.array_split(np.arange(len(total)), min(_POINTS, len(total)))
    fullest = [int(part[total[part].argmax()]) for part in parts]
    return np.unique([0, *fullest, len(total) - 1])


class _Kinds:
    """Says what a block of memory is."""

    def __init__(self, trace: Trace, kinds: Mapping[str, str]) -> None:
        self.trace, self.kinds = trace, kinds
        self._ends = {
            name: sorted(
                event["ts"] + event["dur"] for event in trace.ranges if event["name"].rpartition("/")[2] == name
            )
            for name in ("rollout", "backward")
        }

    def changes(self, events: list[Event]) -> Iterable[tuple[int, str, int]]:
        """(number of the event, kind, bytes), both ends of a block of one kind."""
        open_: dict[Any, int] = {}
        freed: dict[int, int] = {}
        for number, event in enumerate(events):
            size, place = event["args"]["Bytes"], event["args"]["Addr"]
            if size > 0:
                open_[place] = number
            elif (begun := open_.pop(place, None)) is not None:
                freed[begun] = number
            elif size < 0:  # it was there before the trace
                yield number, OTHER, size
        for number, event in enumerate(events):
            size = event["args"]["Bytes"]
            if size <= 0:
                continue
            end = freed.get(number)
            kind = self._kind(event, _NEVER if end is None else events[end]["ts"])
            yield number, kind, size
            if end is not None:
                yield end, kind, events[end]["args"]["Bytes"]

    def _kind(self, event: Event, freed: float) -> str:
        begun, phase = event["ts"], self.trace.phase_at(event["tid"], event["ts"])
        stage, _, name = phase.partition("/")
        kind = self.kinds.get(phase)
        if kind == TRANSFORMER and name.endswith("backward"):
            return GRADIENTS if freed > self._end("backward", begun) else ACTIVATIONS
        if kind == TRANSFORMER:
            return GRAPHS if stage == "rollout" and freed > self._end("rollout", begun) else ACTIVATIONS
        if kind == OPTIMIZER:
            return OPTIMISER
        if kind in (DECODE, REWARD) or stage == "reward":
            return PICTURES
        if stage == "rollout":
            return LATENTS
        return ACTIVATIONS if kind == OPS else OTHER

    def _end(self, name: str, time: float) -> float:
        """When the range of that name ends that runs then."""
        place = bisect_right(self._ends[name], time)
        return self._ends[name][place] if place < len(self._ends[name]) else _NEVER
