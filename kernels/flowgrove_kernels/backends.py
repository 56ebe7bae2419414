"""Which implementation an op runs on: chosen inside the op at run time, by `use_backend`, by FLOWGROVE_BACKEND, or by device.

A backend is a module that defines the implementations of `OPS` as plain functions on tensors. Each op file registers its own reference.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}
_forced: str | None = None  # process-wide: the backward of an op runs on another thread than its forward


def implements(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes `op` on `backend`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations[op, backend] = function
        return function

    return register


def available_backends() -> tuple[str, ...]:
    """The names that `use_backend` accepts here, in the order of `BACKENDS`."""
    present = {backend for _, backend in _implementations}
    return tuple(backend for backend in BACKENDS if backend in present)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block, in all threads, on backend `name`. Raises ValueError for a name that is not available."""
    global _forced
    before, _forced = _forced, _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def implementation(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `op` for inputs like `tensor`. float64 tensors always take the reference."""
    name = _forced or os.environ.get("FLOWGROVE_BACKEND") or "auto"
    if name == "auto" or str(tensor.dtype) == "torch.float64":
        name = "reference"
    return _implementations[op, _checked(name, "FLOWGROVE_BACKEND")]


def _checked(name: str, source: str) -> str:
    if name not in available_backends():
        raise ValueError(f"{source}: backend {name!r} is not available here: write one of {', '.join(available_backends())}")
    return name
