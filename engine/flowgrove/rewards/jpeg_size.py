"""How well a picture compresses: a reward without weights, for smoke tests of any model."""

import io

import torch
from PIL import Image
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.rewards.pixels import to_bytes


class JpegSizeReward:
    """Minus the size of the picture as a JPEG file of `quality`, in kilobytes; `bigger: true` rewards size
    instead (DDPO 2305.13301).
    """

    def __init__(self, quality: int = 95, bigger: bool = False) -> None:
        if not isinstance(quality, int) or not 1 <= quality <= 100:
            raise UserError(f"reward jpeg_size: quality is {quality!r}: write a whole number from 1 to 100")
        self.quality, self.sign = quality, 1.0 if bigger else -1.0

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B] on the CPU."""
        return torch.tensor([self.sign * self._kilobytes(picture) for picture in to_bytes(pictures)])

    def _kilobytes(self, picture: Tensor) -> float:
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000
