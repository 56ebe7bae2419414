"""Pictures as files hold them."""

import torch
from torch import Tensor


def to_bytes(pictures: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] → uint8 [..., H, W, 3] on the CPU, rounded."""
    return (pictures.detach().float() * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().cpu()
