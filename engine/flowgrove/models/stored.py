"""The precision in which weights are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowgrove.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def rounded(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in `dtype` (None: its own). Raises UserError if it is too large for it."""
    if dtype is None or dtype == tensor.dtype or not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if result.isinf().any() and not tensor.isinf().any():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"--dtype: {name} holds numbers that are too large for {kind}: write bf16 or fp32")
    return result


def all_in(transformer: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`dtype` for all weights but those that the transformer's class keeps in fp32."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or []
    names = list(transformer.state_dict())
    return {name: torch.float32 if any(part in kept for part in name.split(".")) else dtype for name in names}


def bf16_in(folder: Path) -> dict[str, torch.dtype]:
    """bf16 for the weights that the files of an untrained transformer hold in bf16."""
    return {name: torch.bfloat16 for name, kind in _kinds(folder).items() if kind == "BF16"}


def all_bf16(folder: Path) -> bool:
    """Whether the files of a transformer hold nothing but bf16."""
    return set(_kinds(folder).values()) == {"BF16"}


def _kinds(folder: Path) -> dict[str, str]:
    """The dtype of every tensor in the files of a folder, as safetensors names it."""
    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                found |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue  # loading says what is wrong with it
    return found


@contextmanager
def stored_in(transformer: nn.Module, dtypes: dict[str, torch.dtype]) -> Iterator[None]:
    """Inside the block the weights of `transformer` are in `dtypes`; those without one, as they are.

    Raises UserError.
    """
    own = []
    try:
        for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers()):
            own.append((tensor, tensor.data))
            tensor.data = rounded(name, tensor.data, dtypes.get(name))
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
