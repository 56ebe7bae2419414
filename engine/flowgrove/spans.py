"""Named ranges of work: one name for torch.profiler, for Nsight (NVTX), for the stage timings and for whoever listens.
Names nest: iteration 12/rollout/step 7/transformer.

A range has a kind, which is its NVTX category and gives its colour, and says how much it works on: model rows, and the
tokens of these. While nothing listens it costs a name and nothing else; whether an NVTX tool does is settled when the
process first asks, since NVTX loads a tool with its first call and never after it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.autograd import profiler

DOMAIN = "flowgrove"
STAGE, TRANSFORMER, OPS, DECODE, REWARD, OPTIMIZER, COMMUNICATION = (
    "stage", "transformer", "ops", "decode", "reward", "optimizer", "communication",
)  # fmt: skip
WAIT = "wait"  # the name of ranges in which an iteration waits for the thread that decodes and scores beside it
COLORS = {  # ARGB; told apart by colour-blind readers as well (Okabe and Ito)
    STAGE: 0xFF999999,
    TRANSFORMER: 0xFF0072B2,
    OPS: 0xFFE69F00,
    DECODE: 0xFF56B4E9,
    REWARD: 0xFF009E73,
    OPTIMIZER: 0xFFCC79A7,
    COMMUNICATION: 0xFFD55E00,
}
SIZES = np.dtype([("rows", np.int64), ("tokens", np.int64)])  # the payload of a range that has rows or tokens

_path: ContextVar[str] = ContextVar("span_path", default="")
_listeners: ContextVar[tuple["Listener", ...]] = ContextVar("span_listeners", default=())


class Span:
    """A range that ends with its `with` block. `path`: its parents' names and its own, joined by "/"; `kind` is a key
    of COLORS; `rows` go through the model or an op, at a cost of `tokens` (see `Prompts`); 0: not said.
    """

    __slots__ = ("_inside", "_token", "kind", "name", "path", "rows", "tokens")

    def __init__(self, name: str, kind: str = STAGE, rows: int = 0, tokens: int = 0) -> None:
        self.name, self.kind, self.rows, self.tokens = name, kind, rows, tokens

    def __enter__(self) -> "Span":
        parent = _path.get()
        self.path = f"{parent}/{self.name}" if parent else self.name
        self._token = _path.set(self.path)
        self._inside: ExitStack | None = None
        listeners = _listeners.get()
        if listeners or profiler._is_profiler_enabled or _domain() is not None:
            try:
                self._inside = self._told_to(listeners)
            except BaseException:
                _path.reset(self._token)
                raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if self._inside is not None:
                self._inside.__exit__(*error)
        finally:
            _path.reset(self._token)

    def _told_to(self, listeners: tuple["Listener", ...]) -> ExitStack:
        """What ends with the range."""
        with ExitStack() as inside:
            if profiler._is_profiler_enabled:
                inside.enter_context(torch.profiler.record_function(self.path))
            if (domain := _domain()) is not None:
                sizes = np.array((self.rows, self.tokens), SIZES) if self.rows or self.tokens else None
                domain.push_range(domain.get_event_attributes(self.path, COLORS[self.kind], self.kind, sizes))
                inside.callback(domain.pop_range)
            for listener in listeners:
                inside.enter_context(listener(self))
            return inside.pop_all()


span = Span


def current_path() -> str:
    """The path of the range that this context is in; empty outside all."""
    return _path.get()


Listener = Callable[[Span], AbstractContextManager[object]]


@cache
def _domain() -> Any:
    """The NVTX domain; None where no tool has been loaded into this process, or the nvtx package is not installed."""
    try:
        import nvtx
    except ImportError:
        return None
    domain = nvtx.get_domain(DOMAIN)
    return domain if isinstance(domain, nvtx.Domain) else None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block `listener` is called with every range that begins, also in threads that take this context with
    them; what it returns is entered then, and left when the range ends.
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def untimed() -> Iterator[None]:
    """No listener hears of the ranges inside the block: a CUDA graph would record their events instead of timing them,
    and what is recorded once runs many times.
    """
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


class Totals:
    """Seconds by name. On a GPU they lie between two events in the stream, so that taking them stops nothing;
    reading them waits for the last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds what the block takes."""
        self._host.setdefault(name, 0.0)
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._host[name] += time.perf_counter() - begun

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of all blocks that have ended, by name, in the order in which the names first came."""
        for name, start, end in self._events:
            end.synchronize()
            self._host[name] += start.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._host)


@contextmanager
def span_totals(device: torch.device) -> Iterator[Totals]:
    """Adds up the spans of each name inside the block."""
    totals = Totals(device)
    with listening(lambda one: totals(one.name)):
        yield totals


class Clock:
    """Seconds per stage, each stage a span."""

    def __init__(self, device: torch.device) -> None:
        self._totals = Totals(device)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        with span(stage), self._totals(stage):
            yield

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every stage."""
        return self._totals.seconds
