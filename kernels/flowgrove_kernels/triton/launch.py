"""How a row of D elements is cut into blocks, and how kernels are launched."""

from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowgrove_kernels.checks import require_offsets

_ONE_AT_A_TIME = Lock()  # the interpreter, which is what takes CPU tensors, holds the place of one program
REGISTERS = 128  # of a thread at most, or two programs of eight warps do not fit a multiprocessor: Triton 3.6 would take up to 155
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False} | ({} if torch.version.hip else {"maxnreg": REGISTERS})  # ROCm's compiler has no such limit


class Blocks(NamedTuple):
    """`number` blocks of `size` elements, each handled by `warps` warps of 32 threads."""

    size: int
    warps: int
    number: int


def blocks_of(elements: int) -> Blocks:
    """The blocks of a row. They depend on D alone, and so does the order in which a row is summed: bit-equal in any batch.

    A thread handles four times four neighbours: each a 128-bit access of fp32 and one Philox counter.
    """
    warps = next(w for w in (1, 2, 4, 8) if elements <= 512 * w or w == 8)
    size = 512 * warps
    return Blocks(size, warps, max(1, -(-elements // size)))


def launch(kernel: Any, programs: int, warps: int, on: Tensor, *arguments: Any, **constants: Any) -> None:
    """Runs `programs` programs of `kernel` on the device of `on`. No product is contracted into a sum but where a kernel writes tl.fma."""
    if programs == 0:
        return
    with torch.cuda.device(on.device) if on.is_cuda else _ONE_AT_A_TIME:
        kernel[(programs,)](*arguments, **constants, num_warps=warps, **OPTIONS)


def row_stride(rows: Tensor | None) -> int:
    """Distance of two rows of [B, D], in elements; 0 for an input that is not there."""
    return 0 if rows is None else rows.stride(0)


def offsets_of(child_offsets: Tensor | None, edges: int) -> Tensor | None:
    """CSR offsets as the kernels read them, checked on the device; None where every parent has `fanout` children."""
    require_offsets(child_offsets, edges)
    return None if child_offsets is None else child_offsets.contiguous()
