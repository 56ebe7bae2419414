"""Named ranges: one name for torch.profiler, for Nsight (NVTX) and for the stage timings. Names nest: iteration/rollout/step 7/transformer."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch

_path: ContextVar[str] = ContextVar("span_path", default="")
_totals: ContextVar[dict[str, float] | None] = ContextVar("span_totals", default=None)


@contextmanager
def span(name: str) -> Iterator[None]:
    """A range that ends with the block; its full name is its parents' names and its own, joined by "/"."""
    parent = _path.get()
    full = f"{parent}/{name}" if parent else name
    token, totals, start = _path.set(full), _totals.get(), time.perf_counter()
    try:
        with torch.profiler.record_function(full), _nvtx_range(name):
            yield
    finally:
        _path.reset(token)
        if totals is not None:
            totals[name] = totals.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def span_totals() -> Iterator[dict[str, float]]:
    """Seconds that the host spent in the spans of each name inside the block; on a GPU, whose queue it only fills, no measure of the work."""
    totals: dict[str, float] = {}
    token = _totals.set(totals)
    try:
        yield totals
    finally:
        _totals.reset(token)


class Clock:
    """Seconds per stage, each stage a span. On a GPU a stage ends with its queue empty, so that it is charged for its own work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        with span(stage):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


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
