"""The two ceilings that a device's figures are held against: a large copy, and a large matrix product."""

import statistics
from collections.abc import Callable

import torch

from flowgrove.spans import Totals

_REPEATS = 10


def copy_rate(device: torch.device, elements: int | None = None) -> float:
    """Bytes per second, read and written, of a copy of fp32 random numbers; `elements`: how many, by default 64 MiB on
    a CPU and 1 GiB on a GPU.
    """
    source = torch.randn(elements or (1 << 24 if device.type == "cpu" else 1 << 28), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOPs per second of a product of random matrices [size, size], by default 512 on a CPU and 8192 on a GPU."""
    size = size or (512 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(device, lambda: a @ b)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The median of `_REPEATS` after one that is not timed."""
    work()
    spent = []
    for _ in range(_REPEATS):
        totals = Totals(device)
        with totals("work"):
            work()
        spent.append(totals.seconds["work"])
    return statistics.median(spent)
