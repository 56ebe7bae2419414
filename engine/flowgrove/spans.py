"""Named ranges: one name for torch.profiler, for Nsight (NVTX) and for the stage timings. Names nest:
iteration/rollout/step 7/transformer.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

_path: ContextVar[str] = ContextVar("span_path", default="")
_totals: ContextVar["Totals | None"] = ContextVar("span_totals", default=None)


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
def span(name: str) -> Iterator[None]:
    """A range that ends with the block; its full name is its parents' names and its own, joined by "/"."""
    parent = _path.get()
    full = f"{parent}/{name}" if parent else name
    token, totals = _path.set(full), _totals.get()
    try:
        with torch.profiler.record_function(full), _nvtx_range(name), nullcontext() if totals is None else totals(name):
            yield
    finally:
        _path.reset(token)


@contextmanager
def span_totals(device: torch.device) -> Iterator[Totals]:
    """Adds up the spans of each name inside the block."""
    totals = Totals(device)
    token = _totals.set(totals)
    try:
        yield totals
    finally:
        _totals.reset(token)


@contextmanager
def untimed() -> Iterator[None]:
    """Spans inside the block are not added up: a CUDA graph would record their events instead of timing them."""
    token = _totals.set(None)
    try:
        yield
    finally:
        _totals.reset(token)


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


def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    annotate = _annotate()
    return nullcontext() if annotate is None else annotate(name, domain="flowgrove")


@cache
def _annotate() -> Any:
    """The nvtx package's context manager, if it is installed: it costs next to nothing while no profiler listens."""
    try:
        from nvtx import annotate
    except ImportError:
        return None
    return annotate
