"""Pictures as files and grids hold them."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowgrove.device import to_host

_LARGEST_TILE = 256


def to_bytes(pictures: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] → uint8 [..., H, W, 3] on the CPU, rounded."""
    return to_host((pictures.detach().float() * 255).round().to(torch.uint8).movedim(-3, -1).contiguous())


def shrink(samples: Tensor, longest: int = _LARGEST_TILE) -> Tensor:
    """Pictures [B, 3, H, W], or the middle frames of videos [B, F, 3, H, W] → fp32 [B, 3, h, w] of
    at most `longest` pixels a side.
    """
    pictures = (samples if samples.ndim == 4 else samples[:, samples.shape[1] // 2]).float()
    scale = longest / max(pictures.shape[-2:])
    if scale >= 1:
        return pictures
    height, width = (max(1, round(side * scale)) for side in pictures.shape[-2:])
    return interpolate(pictures, (height, width), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
