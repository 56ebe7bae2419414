"""What a CLIP image processor does, on tensors on their device: resize, centre crop, normalise.

Resizing is torch's antialiased bicubic or bilinear filter, the one that PIL uses (a = −1/2, support scaled with the
reduction), in fp32. PIL rounds to 8 bits after each of its two passes; here nothing is rounded but values that
overshoot are cut to [0, 1], so a pixel differs by about a grey level at the most.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from flowgrove.device import to_device
from flowgrove.errors import UserError
from flowgrove.rewards.weights import read_json

_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """`shorter`: the shorter side is resized to it (None: both sides are, to `size`); then the centre `crop` (height,
    width) is cut out, or nothing if None.
    """

    shorter: int | None
    size: tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: str = "bicubic"

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] → what the model reads, fp32 [B, 3, h, w]."""
        height, width = pictures.shape[-2:]
        target = self.size
        if self.shorter is not None:
            short, long = self.shorter, int(self.shorter * max(height, width) / min(height, width))
            target = (long, short) if height > width else (short, long)
        resized = resize(pictures, target, self.filter)
        return self.normalise(resized if self.crop is None else centre_crop(resized, self.crop))

    def normalise(self, pictures: Tensor) -> Tensor:
        mean, std = (
            to_device(torch.tensor(values), pictures.device).view(1, 3, 1, 1) for values in (self.mean, self.std)
        )
        return (pictures - mean) / std


def resize(pictures: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Pictures [B, 3, H, W] → fp32 [B, 3, *size] in [0, 1]."""
    pictures = pictures.float()
    if pictures.shape[-2:] == size:
        return pictures
    return interpolate(pictures, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def centre_crop(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of the pictures; what a side lacks is black."""
    (height, width), (tall, wide) = size, pictures.shape[-2:]
    lack_y, lack_x = max(0, height - tall), max(0, width - wide)
    if lack_y or lack_x:
        pictures = pad(pictures, (-(-lack_x // 2), lack_x // 2, -(-lack_y // 2), lack_y // 2))
    top, left = (pictures.shape[-2] - height) // 2, (pictures.shape[-1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def fit(pictures: Tensor, side: int) -> Tensor:
    """The whole picture inside a square of `side`: the longer side is resized to it,
    the shorter one filled up with black on both ends.
    """
    height, width = pictures.shape[-2:]
    scale = side / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    free_y, free_x = side - rows, side - columns
    return pad(
        resize(pictures, (rows, columns)), (free_x // 2, free_x - free_x // 2, free_y // 2, free_y - free_y // 2)
    )


def read_preprocess(folder: Path, reward: str) -> Preprocess:
    """The settings of the processor in `folder`: preprocessor_config.json, or `image_processor` of
    processor_config.json, where newer releases put them.
    """
    settings = None
    if (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json", reward).get("image_processor")
    if settings is None:
        settings = read_json(folder / "preprocessor_config.json", reward)
    try:
        height, width, shorter = _size(settings["size"])
        crop = _size(settings["crop_size"])[:2] if settings.get("do_center_crop", True) else None
        mean, std = (tuple(float(value) for value in settings[key]) for key in ("image_mean", "image_std"))
        return Preprocess(shorter, (height, width), crop, mean, std, _FILTERS[settings.get("resample", 3)])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"reward {reward}: the image settings in {folder} are not those of a CLIP ({error!r}): "
            "fetch its folder again"
        ) from None


def _size(size: Any) -> tuple[int, int, int | None]:
    """Height, width, and the shorter side where only that is given."""
    if isinstance(size, int):
        return size, size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"], size["shortest_edge"]
    return size["height"], size["width"], None
