"""torch.compile of a transformer, block by block: the blocks of a kind share their code, so one of each is compiled and
all run faster. What is compiled holds for any number of rows from two on and any lengths; one row has its
own graphs.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowgrove.models.blocks import blocks_of
from flowgrove.process import on_several_machines

BACKEND = "inductor"
# Graphs of one kind of block: with and without a gradient, of one row and more, with LoRA layers on and off, of a first
# or last block that differs. torch would run a kind eagerly after 8.
_MOST_GRAPHS = 64


def compile_blocks(transformer: nn.Module, mode: bool | str = True) -> int:
    """Compiles every block of the transformer's lists of blocks; returns how many. They compile when they first run.

    `mode`: of torch.compile; True: its default. What inductor writes is kept in the user's cache folder between runs,
    unless TORCHINDUCTOR_CACHE_DIR says where, or the run is one of several machines.
    """
    settle_compiler()
    blocks = blocks_of(transformer)
    for block in blocks:
        block.compile(**_options(mode))
    return len(blocks)


def leave_uncompiled(transformer: nn.Module) -> None:
    """Takes back `compile_blocks`."""
    for block in blocks_of(transformer):
        block._compiled_call_impl = None


def compiled(call: Callable[..., Any], mode: bool | str = True) -> Callable[..., Any]:
    """A function that runs blocks, compiled as they are."""
    settle_compiler()
    return torch.compile(call, **_options(mode))


def _options(mode: bool | str) -> dict[str, Any]:
    return {"dynamic": True, "backend": BACKEND, "mode": None if isinstance(mode, bool) else mode}


def settle_compiler() -> None:
    """Whatever is compiled from here on holds for any sizes, may have a graph for each of its uses, and is kept."""
    import torch._dynamo.config as dynamo
    import torch.fx.experimental._config as shapes

    _keep_what_is_compiled()
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_GRAPHS)
    shapes.use_duck_shape = False  # it takes lengths that are equal once for the same, and compiles anew when they part


def eager_blocks(transformer: nn.Module) -> AbstractContextManager[object]:
    """Inside, the transformer's compiled blocks run as they were. Whatever counts their operations runs in it: a block
    that torch.compile first meets under a dispatch mode stays eager from then on.
    """
    compiled = any(block._compiled_call_impl is not None for block in blocks_of(transformer))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _keep_what_is_compiled() -> None:
    """A folder that cannot be made or written leaves torch its own, in the system's folder for temporary files; so do
    several machines, which may share a home folder and see each other's files change while they read them.
    """
    if on_several_machines():
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowgrove" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
