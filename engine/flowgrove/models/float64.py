"""float64 throughout, for tests that compare two orders of the same arithmetic:
diffusers' RMSNorm would round its statistics to fp32.
"""

from functools import partial

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


def keep_float64(transformer: nn.Module) -> None:
    """Makes every RMSNorm of a float64 transformer compute in float64."""
    for module in transformer.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(_normalise, module)


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        x = x * norm.weight
    return x if norm.bias is None else x + norm.bias
