"""Counts reads of a tensor's value by the host: each would stop the queue of a GPU."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_host_reads(work: Callable[[], object]) -> int:
    """Number of `_local_scalar_dense` calls that `work` makes."""
    with _Counter() as counter:
        work()
    return counter.reads
