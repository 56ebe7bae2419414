"""The compiled op libraries: found beside this file, loaded once, without Python in them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

NAMES = ("cpu", "cuda")  # backends that are compiled; "cuda" adds kernels to the ops that "cpu" defines
_HERE = Path(__file__).parent
_COMPILE = "pip install --no-build-isolation -e ."
_INSTALL = f"a C++ compiler and ninja, then: {_COMPILE}"


def missing(name: str) -> str | None:
    """Why library `name` cannot be used here, or None. Loads it on first use."""
    reason = _load(name)
    if reason is None and name == "cuda" and not sees_gpu():
        return "torch sees no GPU"
    return reason


@cache
def sees_gpu() -> bool:
    """torch.cuda.is_available(), asked once: it takes longer than an op."""
    return torch.cuda.is_available()


@cache
def _load(name: str) -> str | None:
    if name == "cuda" and (reason := _load("cpu")) is not None:
        return reason
    found = sorted(_HERE.glob(f"_{name}.*so")) + sorted(_HERE.glob(f"_{name}.*pyd"))
    if not found:
        return f"it was not compiled: it needs {'nvcc, a CUDA build of torch, ' if name == 'cuda' else ''}{_INSTALL}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load, compile it again ({str(error).splitlines()[0]})"
    if not _fits():
        return f"{found[0].name} does not fit this version of flowgrove_kernels: compile it again ({_COMPILE})"
    return None


def _fits() -> bool:
    """Whether the ops that were loaded take what this version calls them with; the loss, which takes most, tells."""
    from flowgrove_kernels.loss_arguments import SCHEMA  # which imports this module

    wanted = f"(Tensor? grad_loss, {SCHEMA.replace('SymInt', 'int')}, Tensor(a!) loss, "
    try:
        return wanted in str(_loss().default._schema)
    except AttributeError:  # there is no such op
        return False


def _loss() -> Any:
    return torch.ops.flowgrove_native.grpo_loss
