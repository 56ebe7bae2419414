"""What a trace of torch.profiler tells of each phase: launches, waits of the host for the device, and when the device
was at work.
"""

import gzip
import json
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flowgrove.bench.counting import ON_THE_DEVICE, op_calls
from flowgrove.profiler.phases import Names

Event = dict[str, Any]
_WAITS = (
    "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuCtxSynchronize",
    "cuStreamSynchronize", "cuEventSynchronize",
)  # fmt: skip
_READ = "aten::_local_scalar_dense"  # of one element, by `.item()` and what calls it
_OURS = re.compile(r"iteration \d+(/|$)")
_OPS = ("aten::", "flowgrove::")
_CALLS = ("cuda_runtime", "cuda_driver")


class Busy(NamedTuple):
    """A stretch of work of the device, in microseconds of the trace, and the phase that launched it."""

    start: float
    end: float
    phase: str


class Trace:
    """The events of a Chrome trace in which every range of an iteration stands as an annotation. Work on a thread that
    has no range of its own, as autograd's, belongs to what the iteration's thread is in then.
    """

    def __init__(self, events: list[Event]) -> None:
        self.events = [event for event in events if "ts" in event]
        # optimisers annotate their steps too
        ours = (event for event in self.events if event.get("cat") == "user_annotation")
        self.ranges = [event for event in ours if _OURS.match(event["name"])]
        self.names = Names(event["name"] for event in self.ranges)
        self._main = next((event["tid"] for event in self.ranges if "/" not in event["name"]), None)
        self._stretches = {tid: _innermost(some) for tid, some in _by_thread(self.ranges).items()}

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """From a file that torch.profiler has written."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return cls(json.load(file)["traceEvents"])

    def path_at(self, thread: Any, time: float) -> str | None:
        """The innermost range that a thread is in; None: none, on the iteration's thread neither."""
        return self._stretches.get(thread, _NOTHING).at(time) or self._stretches.get(self._main, _NOTHING).at(time)

    def phase_at(self, thread: Any, time: float) -> str:
        """The phase that a thread is in."""
        return self.names.of(self.path_at(thread, time))

    def inside(self, thread: Any, time: float) -> bool:
        """Whether an iteration runs then."""
        return self.path_at(thread, time) is not None

    @property
    def seconds(self) -> float:
        """Of all iterations."""
        return sum(event["dur"] for event in self.ranges if event["name"].count("/") == 0) / 1e6

    def stages(self, origin: float) -> list[tuple[str, float, float]]:
        """Name, begin and end of every stage of the iterations' own thread, in seconds from `origin`, a time of the
        trace.
        """
        found = (event for event in self.ranges if event["name"].count("/") == 1 and event["tid"] == self._main)
        return [
            (
                event["name"].rpartition("/")[2],
                (event["ts"] - origin) / 1e6,
                (event["ts"] + event["dur"] - origin) / 1e6,
            )
            for event in sorted(found, key=lambda event: event["ts"])
        ]

    @cached_property
    def on_gpu(self) -> bool:
        """Whether a GPU was traced."""
        return any(event.get("cat") in ON_THE_DEVICE for event in self.events)

    @cached_property
    def busy(self) -> list[Busy]:
        """Kernels, copies and fills of the GPU, in the order of their start."""
        return sorted(
            Busy(event["ts"], event["ts"] + event["dur"], self.phase_at(*self._launched(event)))
            for event in self._on_the_device
        )

    @cached_property
    def _on_the_device(self) -> list[Event]:
        """What the GPU did for an iteration."""
        work = (event for event in self.events if event.get("cat") in ON_THE_DEVICE)
        return [event for event in work if self.inside(*self._launched(event))]

    @cached_property
    def _calls(self) -> dict[int, Event]:
        """The call of every launch, by its number."""
        calls = (event for event in self.events if event.get("cat") in _CALLS)
        return {event["args"]["correlation"]: event for event in calls if "correlation" in event.get("args", {})}

    def _launched(self, event: Event) -> tuple[Any, float]:
        """On which thread and when; work whose call the trace lacks is taken for that of the range it runs in."""
        call = self._calls.get(event["args"].get("correlation"))
        return (self._main, event["ts"]) if call is None else (call["tid"], call["ts"])

    def heaviest(self) -> Counter[str]:
        """Microseconds by name: of what the GPU did, or of a CPU's outermost ops of PyTorch and of ours."""
        found: Counter[str] = Counter()
        if self.on_gpu:
            for event in self._on_the_device:
                found[event["name"]] += event["dur"]
            return found
        ends: dict[Any, float] = {}
        ops = (event for event in self.events if event.get("cat") == "cpu_op" and event["name"].startswith(_OPS))
        for event in sorted(self._in_iterations(ops), key=lambda event: (event["ts"], -event["dur"])):
            if event["ts"] >= ends.get(event["tid"], 0.0):
                ends[event["tid"]] = event["ts"] + event["dur"]
                found[event["name"]] += event["dur"]
        return found

    def launches(self) -> Counter[str]:
        """By phase: on a GPU kernels, copies and fills; on a CPU the outermost ops that do work."""
        if self.on_gpu:
            return Counter(one.phase for one in self.busy)
        groups: defaultdict[tuple[str, Any], list[Event]] = defaultdict(list)
        for event in self._in_iterations(event for event in self.events if event.get("cat") == "cpu_op"):
            groups[self.phase_at(event["tid"], event["ts"]), event["tid"]].append(event)
        found: Counter[str] = Counter()
        for (phase, _), events in groups.items():
            found[phase] += op_calls(events)
        return found

    def waits(self) -> Counter[str]:
        """By phase, how often the host waited for the GPU; on a CPU, how often it read one element of a tensor,
        which on a GPU mostly is a wait.
        """
        if self.on_gpu:
            waits = (event for event in self.events if event.get("cat") in _CALLS and event["name"] in _WAITS)
        else:
            waits = (event for event in self.events if event.get("cat") == "cpu_op" and event["name"] == _READ)
        return Counter(self.phase_at(event["tid"], event["ts"]) for event in self._in_iterations(waits))

    def _in_iterations(self, events: Iterable[Event]) -> Iterator[Event]:
        return (event for event in events if self.inside(event["tid"], event["ts"]))


class _Stretches(NamedTuple):
    """From times[i] on a thread is in paths[i]."""

    times: list[float]
    paths: list[str | None]

    def at(self, time: float) -> str | None:
        place = bisect_right(self.times, time) - 1
        return self.paths[place] if place >= 0 else None


_NOTHING = _Stretches([], [])


def _by_thread(ranges: list[Event]) -> dict[Any, list[Event]]:
    found: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in ranges:
        found[event["tid"]].append(event)
    return found


def _innermost(ranges: list[Event]) -> _Stretches:
    """Of one thread, whose ranges lie inside or after each other."""
    times: list[float] = []
    paths: list[str | None] = []
    open_: list[tuple[float, str]] = []  # (end, path), the innermost last

    def close(until: float) -> None:
        while open_ and open_[-1][0] <= until:
            end, _ = open_.pop()
            times.append(end)
            paths.append(open_[-1][1] if open_ else None)

    for event in sorted(ranges, key=lambda event: (event["ts"], -event["dur"])):
        close(event["ts"])
        open_.append((event["ts"] + event["dur"], event["name"]))
        times.append(event["ts"])
        paths.append(event["name"])
    close(float("inf"))
    return _Stretches(times, paths)
