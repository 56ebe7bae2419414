"""Interleaved timing: in every round each contender runs once, in an order drawn anew, so that drift of the machine meets all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy
import torch

from flowgrove.bench.cases import Contender
from flowgrove_kernels import use_backend

WARM_UP = 2
_LEAST_FLUSH = 2**28
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
    """Times every entrant `rounds` times after `WARM_UP` calls of each; outputs are freed outside the clock, garbage after all rounds."""
    times: dict[str, list[float]] = {contender.name: [] for contender in entrants}
    shuffled, order = random.Random(0), list(entrants)
    with _no_garbage_collection():
        for turn in range(WARM_UP + rounds):
            shuffled.shuffle(order)
            for contender in order:
                spent = clock(contender)
                if turn >= WARM_UP:
                    times[contender.name].append(spent)
    return {name: Spread(*(float(q) for q in numpy.quantile(values, (0.5, 0.1, 0.9)))) for name, values in times.items()}


def copier(traffic: int, device: torch.device) -> Contender:
    """Reads and writes `traffic` bytes in one copy between two buffers that exist already: the bandwidth that others are compared with."""
    source = torch.ones(max(traffic // 8, 1), device=device)
    target = torch.ones_like(source)
    return Contender("copy", lambda: (target.copy_(source),))


def _cpu_clock(contender: Contender) -> float:
    """Caches as the contender before left them."""
    with use_backend(contender.backend or "auto"):
        start = time.perf_counter_ns()
        outputs = contender.run()
        stop = time.perf_counter_ns()
    del outputs
    return (stop - start) / 1e3


def _gpu_clock(device: torch.device) -> Clock:
    """Events around a call on an idle device with an emptied L2 cache; so the time of launching counts as far as the device has to wait for it."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(2 * cache, _LEAST_FLUSH), dtype=torch.int8, device=device)

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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
