"""How many bytes the fused ops have to move: every tensor that one of their calls takes or returns, once."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowgrove.spans import Span, listening


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the ops of flowgrove_kernels by the path of the range that they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_of: defaultdict[str, int] = defaultdict(int)
        self._path, self._own = "", threading.get_ident()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "flowgrove":
            moved = (each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor))
            self.bytes_of[self._path] += sum(tensor.nbytes for tensor in moved)
        return result

    @contextmanager
    def follow(self, span: Span) -> Iterator[None]:
        """A listener that keeps the path of the range that runs."""
        if threading.get_ident() != self._own:
            yield
            return
        before, self._path = self._path, span.path
        try:
            yield
        finally:
            self._path = before


def traffic_of(run: Callable[[], object]) -> dict[str, int]:
    """Bytes by path of the ranges of `run` in whose calls they move, on the thread that calls this. What is compiled
    runs eagerly meanwhile: under a dispatch mode torch.compile gives up what it meets first, for good.
    """
    traffic = Traffic()
    with listening(traffic.follow), torch.compiler.set_stance("force_eager"), traffic:
        run()
    return dict(traffic.bytes_of)
