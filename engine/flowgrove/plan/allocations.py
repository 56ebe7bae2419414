"""How much a model's code holds at once: its allocations are counted as they come and go, on tensors with or without
storage.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


def peak_bytes(run: Callable[[], object], like_cuda: bool = False) -> int:
    """Most bytes alive at once while `run` runs, of storages that it makes itself."""
    with _Alive() as alive, _norms_in_fp32() if like_cuda else nullcontext():
        run()
    return alive.most


def host_bytes(run: Callable[[], object]) -> int:
    """Most bytes alive at once while `run` runs, of what a prediction has in pinned host memory (on the device `meta`);
    torch takes the next power of two for each piece.
    """
    with _Alive(on_host=True) as alive:
        run()
    return alive.most


def graph_bytes(velocity: Callable[[int], object], like_cuda: bool = False) -> int:
    """What a row more holds as long as the differentiable velocity of a pass lives;
    `velocity` takes the pass's rows.
    """
    held = []
    for rows in (1, 2):
        with _Alive() as alive, _norms_in_fp32() if like_cuda else nullcontext():
            result = velocity(rows)
            held.append(alive.bytes)
            del result
    return held[1] - held[0]


class _Alive(TorchDispatchMode):
    """Adds up the storages of all results that come from nowhere: what was there before is written to or viewed. Those
    of the device, or `on_host` of pinned host memory.
    """

    def __init__(self, on_host: bool = False) -> None:
        super().__init__()
        self.on_host = on_host
        self.bytes = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), 0)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta == self.on_host:
                storage = leaf.untyped_storage()
                size = storage.nbytes()
                self._count(storage, 1 << (size - 1).bit_length() if self.on_host and size else size)
        return result

    def _count(self, storage: Any, size: int) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self.bytes += size
        self.most = max(self.most, self.bytes)

        def gone(_: object) -> None:
            if self._known.pop(key, None) is not None:
                self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)


@contextmanager
def _norms_in_fp32() -> Iterator[None]:
    """Autocast computes norms in fp32 on a GPU, but not on the CPU, whose rules the tensors without storage follow.

    The functions themselves are exchanged: a mode would be off where checkpoints recompute.
    """
    kept = {name: getattr(functional, name) for name in ("layer_norm", "group_norm", "rms_norm")}

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return norm(*args, **kwargs)

        return run

    try:
        for name, norm in kept.items():
            setattr(functional, name, in_fp32(norm))
        yield
    finally:
        for name, norm in kept.items():
            setattr(functional, name, norm)
