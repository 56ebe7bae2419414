"""Interleaved timing: in every round each contender runs once, in an order drawn anew,
so that drift of the machine meets all of them alike.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy
import torch

from flowgrove.bench.cases import Contender
from flowgrove.passes.recordings import leave_pool
from flowgrove_kernels import use_backend

WARM_UP = 2
_LEAST_FLUSH = 2**28
_LARGEST_GRAPH = 64  # calls
_QUEUED = 200_000  # cycles that the GPU is kept busy while a graph is launched: 0.1 ms
Clock = Callable[[Contender], float]  # microseconds of one call


class Spread(NamedTuple):
    """Microseconds."""

    median: float
    q10: float
    q90: float


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return _gpu_clock(device) if device.type == "cuda" else _cpu_clock


def interleave(entrants: list[Contender], clock: Clock, rounds: int) -> dict[str, Spread]:
    """Times every entrant `rounds` times after `WARM_UP` calls of each;
    outputs are freed outside the clock, garbage after all rounds.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in entrants}
    shuffled, order = random.Random(0), list(entrants)
    with _no_garbage_collection():
        for turn in range(WARM_UP + rounds):
            shuffled.shuffle(order)
            for contender in order:
                spent = clock(contender)
                if turn >= WARM_UP:
                    times[contender.name].append(spent)
    return _spreads(times)


def copier(traffic: int, device: torch.device) -> Contender:
    """Reads and writes `traffic` bytes between two buffers that exist already: the bandwidth that others are compared
    with.

    A kernel that negates, for a copy inside a CUDA graph is left to a slower engine: on an H200 it moved 2.7 TB/s there
    and 4.1 outside.
    """
    source = torch.ones(max(traffic // 8, 1), device=device)
    target = torch.ones_like(source)
    return Contender("copy", lambda: (torch.neg(source, out=target),))


def _cpu_clock(contender: Contender) -> float:
    """Caches as the contender before left them."""
    with use_backend(contender.backend or "auto"):
        start = time.perf_counter_ns()
        outputs = contender.run()
        stop = time.perf_counter_ns()
    del outputs
    return (stop - start) / 1e3


def _gpu_clock(device: torch.device) -> Clock:
    """Events around a call on an idle device with an emptied L2 cache;
    so the time of launching counts as far as the device has to wait for it.
    """
    flush = _flusher(device)

    def clock(contender: Contender) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with use_backend(contender.backend or "auto"):
            torch.cuda.synchronize(device)
            flush.zero_()
            start.record()
            outputs = contender.run()
            stop.record()
            torch.cuda.synchronize(device)
        del outputs
        return 1e3 * start.elapsed_time(stop)

    return clock


class Graph(NamedTuple):
    """A CUDA graph of `calls` calls of one contender, each on inputs of its own;
    `outputs` keep what they write from being written over.
    """

    name: str
    replay: Callable[[], None]
    calls: int
    outputs: list[tuple[torch.Tensor, ...]]


def calls_per_graph(traffic: int, device: torch.device) -> int:
    """How many calls, on inputs of their own, move so much memory that the L2 cache serves none of them."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_LARGEST_GRAPH, math.ceil(4 * cache / traffic)))


def record(calls: Sequence[Contender], device: torch.device) -> Graph:
    """One graph of one contender's `calls`. Raises RuntimeError where they cannot be captured."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with use_backend(calls[0].backend or "auto"):
        # what a first call allocates and compiles must not be captured; autograd remembers the stream
        with torch.cuda.stream(side):
            for call in calls:
                call.run()
        caller = torch.cuda.current_stream(device)
        caller.wait_stream(side)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # a failed capture would leave `side` current
            with torch.cuda.stream(caller), torch.cuda.graph(graph, pool=pool, stream=side):
                outputs = [call.run() for call in calls]
        except RuntimeError:
            leave_pool(device, pool)
            raise
    return Graph(calls[0].name, graph.replay, len(calls), outputs)


def interleave_graphs(graphs: list[Graph], device: torch.device, rounds: int) -> dict[str, Spread]:
    """Microseconds of one call inside a graph: the GPU's time alone, without launching.
    The queue is never empty while a graph begins.
    """
    flush = _flusher(device)
    times: dict[str, list[float]] = {graph.name: [] for graph in graphs}
    shuffled, order = random.Random(0), list(graphs)
    for turn in range(WARM_UP + rounds):
        shuffled.shuffle(order)
        for graph in order:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            flush.zero_()
            torch.cuda._sleep(_QUEUED)
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize(device)
            if turn >= WARM_UP:
                times[graph.name].append(1e3 * start.elapsed_time(stop) / graph.calls)
    return _spreads(times)


def _spreads(times: dict[str, list[float]]) -> dict[str, Spread]:
    quantiles = {name: numpy.quantile(values, (0.5, 0.1, 0.9)) for name, values in times.items()}
    return {name: Spread(*(float(q) for q in found)) for name, found in quantiles.items()}


def _flusher(device: torch.device) -> torch.Tensor:
    """A buffer that takes the whole L2 cache when it is written."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(2 * cache, _LEAST_FLUSH), dtype=torch.int8, device=device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
