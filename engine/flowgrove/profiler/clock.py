"""The time of every range of an iteration, taken while nothing else listens."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flowgrove.spans import Span


class Spent(NamedTuple):
    """All ranges of one path on one thread: how many, their rows and tokens, and seconds from begin to end.

    `beside`: they ran on another thread than the iteration's own, beside its work.
    """

    path: str
    beside: bool
    kind: str
    passes: int
    rows: int
    tokens: int
    seconds: float


@dataclass
class _Sum:
    kind: str
    passes: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Stopwatch:
    """A listener that adds up the ranges of each path, per thread. On a GPU a range lies between two events in the
    stream that is current on its thread; reading the sums waits for the last of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.get_ident()
        self._sums: dict[tuple[str, bool], _Sum] = {}
        self._events: list[tuple[_Sum, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, span: Span) -> Iterator[None]:
        with self._lock:
            found = self._sums.setdefault((span.path, threading.get_ident() != self._own), _Sum(span.kind))
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(self.device))
            yield
            end.record(torch.cuda.current_stream(self.device))
            self._events.append((found, start, end))
            spent = 0.0
        else:
            begun = time.perf_counter()
            yield
            spent = time.perf_counter() - begun
        with self._lock:  # a range that ends in an error, for which memory was too small, counts for its parent
            found.passes += 1
            found.rows += span.rows
            found.tokens += span.tokens
            found.seconds += spent

    def read(self) -> list[Spent]:
        """What has been added up, in the order in which the paths first came."""
        for found, start, end in self._events:
            end.synchronize()
            found.seconds += start.elapsed_time(end) / 1e3
        self._events.clear()
        return [
            Spent(path, beside, one.kind, one.passes, one.rows, one.tokens, one.seconds)
            for (path, beside), one in self._sums.items()
            if one.passes
        ]
