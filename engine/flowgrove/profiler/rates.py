"""What the device itself can do, which a profile's figures are held against."""

from typing import NamedTuple

import torch

from flowgrove.device import is_out_of_memory, release_memory
from flowgrove.models.policy import COMPUTE_DTYPES
from flowgrove.rates.kept import keep_rates, rates_of
from flowgrove.rates.measuring import copy_rate, matrix_rate


class Ceilings(NamedTuple):
    """FLOP/s of a large matrix product, bytes per second of a large copy; None: not known."""

    matrix: float | None
    copied: float | None


def ceilings(device: torch.device, dtype: str) -> Ceilings:
    """Measured now and kept for `flowgrove plan --time`, the product in model.dtype `dtype`; where a GPU's memory has
    no room beside a model, what was kept before.
    """
    release_memory(device)
    try:
        matrix_here, copied_here = matrix_rate(device, COMPUTE_DTYPES[dtype]), copy_rate(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        kept = rates_of(device)
        matrix, copied = kept.matrix.get(dtype), kept.copied
        return Ceilings(None if matrix is None else matrix.rate, None if copied is None else copied.rate)
    keep_rates(device, matrix={dtype: matrix_here}, copied=copied_here)
    return Ceilings(matrix_here, copied_here)
