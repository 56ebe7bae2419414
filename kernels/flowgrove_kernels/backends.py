"""Which implementation an op runs on: chosen inside the op at run time, by
`use_backend`, by FLOWGROVE_BACKEND, or by device.

A backend is a set of functions on tensors, one per op, registered with `implements`. The reference is registered by the
op files themselves; the module of another backend is imported when that backend first runs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock, get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrove_kernels import libraries

BACKENDS = ("reference", "cpu", "triton", "cuda")
_MODULES = {"cpu": "flowgrove_kernels.native", "triton": "flowgrove_kernels.triton", "cuda": "flowgrove_kernels.native"}
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}
_blocks: tuple["_Block", ...] = ()  # entered and not left, in order, by all threads
_one_at_a_time = Lock()


def implements(op: str, *backends: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes `op` on `backends`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for backend in backends:
            _implementations[op, backend] = function
        return function

    return register


def available_backends() -> tuple[str, ...]:
    """The names that `use_backend` accepts here, in the order of `BACKENDS`."""
    return tuple(backend for backend in BACKENDS if missing(backend) is None)


def missing(backend: str) -> str | None:
    """Why `backend` cannot run here and what would help, or None if it can."""
    if backend in libraries.NAMES:
        return libraries.missing(backend)
    if backend == "triton":
        if not _has_triton():
            return "triton is not installed: pip install triton"
        if not libraries.sees_gpu() and not _interpreting():
            return "torch sees no GPU (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    return None


class _Block(NamedTuple):
    """One `with use_backend(...)`."""

    name: str
    thread: int


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the block on backend `name`; "auto" chooses by device.

    The block counts for its thread, and for threads that are in no block of their own: the backward of an op may run
    on another thread than its forward. torch.compile traces none: under fullgraph=True it fails, else what is around
    it runs uncompiled. Raises ValueError for a name that is not available.
    """
    block = _enter(name)
    try:
        yield
    finally:
        _leave(block)


def _enter(name: str) -> _Block:
    global _blocks
    _not_compiled()
    block = _Block(_checked(name, "use_backend"), get_ident())
    with _one_at_a_time:
        _blocks = (*_blocks, block)
    return block


def _leave(block: _Block) -> None:
    global _blocks
    _not_compiled()
    with _one_at_a_time:
        _blocks = tuple(other for other in _blocks if other is not block)


def _not_compiled() -> None:
    """Breaks the graph that torch.compile traces; its decorator for that, `disable`, takes a second to import."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg="use_backend chooses when an op runs: enter it outside of what is compiled")


def forced() -> str | None:
    """The backend of the block that this thread entered last, or else of the one that any thread did."""
    blocks = _blocks
    if not blocks:
        return None
    here = get_ident()
    return next((block for block in reversed(blocks) if block.thread == here), blocks[-1]).name


def implementation(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that computes `op` for inputs like `tensor`. float64 tensors always take the reference.

    Raises ValueError if the backend that was asked for is not available or takes no tensors of that device.
    """
    name = _checked(forced() or os.environ.get("FLOWGROVE_BACKEND") or "auto", "FLOWGROVE_BACKEND")
    if tensor.dtype == torch.float64:
        name = "reference"
    elif name == "auto":
        name = automatic(tensor.device.type)
    elif not takes(name, device := tensor.device.type):
        raise ValueError(
            f"backend {name!r} takes no {device} tensors: move them, or write {automatic(device)!r} or 'auto'"
        )
    if (op, name) not in _implementations:
        import_module(_MODULES[name])
    return _implementations[op, name]


def automatic(device_type: str) -> str:
    """The fastest available backend for tensors of a device type: cuda, then triton, on
    a GPU; cpu on a CPU; else the reference.
    """
    return next(
        name
        for name in ("cuda", "triton", "cpu", "reference")
        if takes(name, device_type) and (name == "reference" or _by_default(name))
    )


def takes(backend: str, device_type: str) -> bool:
    """Whether `backend` computes on tensors of that device type."""
    if backend == "triton":
        return device_type == ("cpu" if _interpreting() else "cuda")
    return backend in ("reference", device_type)


def _by_default(backend: str) -> bool:
    return missing(backend) is None and not (backend == "triton" and _interpreting())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str, source: str) -> str:
    if name != "auto" and (name not in BACKENDS or missing(name) is not None):
        reason = f" ({missing(name)})" if name in BACKENDS else ""
        available = ", ".join(available_backends())
        raise ValueError(f"{source}: backend {name!r} is not available here{reason}: write one of auto, {available}")
    return name
