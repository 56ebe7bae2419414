"""Which device a run uses, and which backend of the fused ops."""

import gc
import os
import re
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Recipe
from flowgrove_kernels import available_backends, use_backend
from flowgrove_kernels.backends import BACKENDS, missing, takes

# What CUDA, Triton and libraries that allocate for themselves say (cuBLAS, cuDNN, NCCL); of cuDNN's internal errors the
# failed allocations.
_OUT_OF_MEMORY = re.compile(
    r"_ALLOC(ATION)?_FAILED\b|(CUDA|driver|HIP) error: out of memory|\[CUDA\]: out of memory"
    r"|(Cuda|HIP) failure( \d+)? 'out of memory'|Failed to CUDA (c|m)alloc\b"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory is exhausted, as PyTorch's allocator or as cuBLAS, cuDNN, NCCL, Triton and CUDA
    say it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def pick_device(recipe: Recipe) -> torch.device:
    """engine.device, with `auto`: a CUDA GPU if there is one. Raises UserError for a GPU that is not there."""
    wanted = recipe.engine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "engine.device is cuda, but torch sees no GPU here: write auto or cpu, or install a CUDA build of torch"
        )
    return torch.device(wanted)


def pick_backend(recipe: Recipe) -> AbstractContextManager[None]:
    """Inside it the fused ops run on engine.backend; `auto` leaves the choice to FLOWGROVE_BACKEND and the device.

    Raises UserError for a backend, from either, that is not here or takes no tensors of the recipe's device.
    """
    device = pick_device(recipe).type
    for source, backend in (
        ("engine.backend", recipe.engine.backend),
        ("FLOWGROVE_BACKEND", os.environ.get("FLOWGROVE_BACKEND") or "auto"),
    ):
        if backend == "auto":
            continue
        choices = ", ".join(("auto", *(name for name in available_backends() if takes(name, device))))
        if backend not in BACKENDS:
            raise UserError(f"{source} is {backend}: write one of {choices}")
        if (reason := missing(backend)) is not None:
            raise UserError(f"{source} is {backend}, which is not available here ({reason}): write one of {choices}")
        if not takes(backend, device):
            raise UserError(f"{source} is {backend}, which takes no {device} tensors: write one of {choices}")
    return nullcontext() if recipe.engine.backend == "auto" else use_backend(recipe.engine.backend)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, copied from pinned memory, so that the host does not wait.

    What lies on a device already stays as it is.
    """
    if device.type == "cpu" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Its values on the host, which waits for them alone and not for what is queued behind."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))
    copied.synchronize()
    return host


def release_memory(device: torch.device) -> None:
    """Frees what only cycles hold, and on a GPU what its allocator and that of pinned host memory keep for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):  # torch 2.10 has none
            torch.accelerator.empty_host_cache()


def total_memory(device: torch.device) -> int:
    """Bytes that the device has; of a CPU, the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allocated_memory(device: torch.device) -> int:
    """Bytes of tensors on the device; on a CPU, where nobody counts them, 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
