"""How a row of D elements is cut into blocks, and how kernels are launched."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from flowgrove_kernels.checks import require_offsets

_HERE = nullcontext()
_ONE_AT_A_TIME = Lock()  # the interpreter, which is what takes CPU tensors, holds the place of one program
# Of a thread at most, or two programs of eight warps do not fit a multiprocessor: Triton 3.6 would take up to 155.
REGISTERS = 128
OPTIONS = {
    "num_stages": 1,
    "enable_fp_fusion": False,
    "debug": True,  # compiles the checks of what only the device sees: element.require
    "sanitize_overflow": False,
} | ({} if torch.version.hip else {"maxnreg": REGISTERS})  # ROCm's compiler has no such limit


class Blocks(NamedTuple):
    """`number` blocks of `size` elements, each handled by `warps` warps of 32 threads."""

    size: int
    warps: int
    number: int


def blocks_of(elements: int) -> Blocks:
    """The blocks of a row.

    They depend on D alone, and so does the order in which a row is summed: bit-equal in any batch.

    A thread handles four times four neighbours: each a 128-bit access of fp32 and one Philox counter.
    """
    warps = next(w for w in (1, 2, 4, 8) if elements <= 512 * w or w == 8)
    size = 512 * warps
    return Blocks(size, warps, max(1, -(-elements // size)))


def launch(kernel: Any, programs: int, warps: int, on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs `programs` programs of `kernel` on the device of `on`.
    No product is contracted into a sum but where a kernel writes tl.fma.
    """
    if programs == 0:
        return
    with _place(on):
        kernel[(programs,)](*arguments, **constants, num_warps=warps, **OPTIONS)


def _place(on: Tensor) -> AbstractContextManager[Any]:
    """Where a kernel runs."""
    if not on.is_cuda:
        return _interpreted()
    return _HERE if on.get_device() == torch.cuda.current_device() else torch.cuda.device(on.device)


@contextmanager
def _interpreted() -> Iterator[None]:
    """One program at a time; what `element.require` raises comes out as it is."""
    with _ONE_AT_A_TIME:
        try:
            yield
        except InterpreterError as error:
            raise error.__cause__ or error from None


def row_stride(rows: Tensor | None) -> int:
    """Distance of two rows of [B, D], in elements; 0 for an input that is not there."""
    return 0 if rows is None else rows.stride(0)


def offsets_of(child_offsets: Tensor | None, parents: int, edges: int) -> Tensor | None:
    """CSR offsets as the kernels read and check them; None where every parent has `fanout` children."""
    if parents == 0:  # no program runs
        require_offsets(child_offsets, edges)
    return None if child_offsets is None else child_offsets.contiguous()
