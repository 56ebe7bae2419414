"""Pictures as files hold them."""

import torch
from torch import Tensor


def to_bytes(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] → uint8 [B, H, W, 3] on the CPU, rounded."""
    return (pictures.detach().float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
