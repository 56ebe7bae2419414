"""A verifiable reward: a program that looks at a picture and checks the colours, shapes, number and places of the
things that the prompt asks for.

Four credits in [0, 1] rise smoothly as a picture comes closer to what is asked, so that one wrong picture can still be
better than another. The score is count · place · (colour + shape)/2; `PASS` is the score from which a picture is called
right.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.tiny.pictures import BACKGROUND, COLOURS, PLACES, RELATIONS, SHAPES, Scene, Thing, parse, signed_distance

PASS = 0.9
_PALETTE = np.array([BACKGROUND, *COLOURS.values()], dtype=np.float32)
_FEWEST_PIXELS = 8  # smaller specks are not things
_LARGEST_SHARE = 0.5  # nor is what covers half of the picture


@dataclass(frozen=True)
class Credits:
    """What one picture gets for one prompt, each in [0, 1]."""

    colour: float
    shape: float
    place: float
    count: float

    @property
    def score(self) -> float:
        return self.count * self.place * (self.colour + self.shape) / 2


@dataclass(frozen=True)
class _Blob:
    mask: NDArray[np.bool_]  # [H, W]
    x: float
    y: float
    area: int


def score_picture(picture: Tensor, scene: Scene) -> Credits:
    """The credits of one picture, fp32 [3, H, W] in [0, 1], for `scene`.
    Distances are measured on a 32×32 picture and scaled to others.
    """
    pixels = picture.permute(1, 2, 0).numpy()  # [H, W, 3]
    labels = np.square(pixels[:, :, None] - _PALETTE).sum(-1).argmin(-1)  # 0: background
    blobs = _blobs(labels != 0)
    if not blobs:
        return Credits(0.0, 0.0, 0.0, 0.0)
    count = min(len(blobs), len(scene.things)) / max(len(blobs), len(scene.things))
    found = []
    for chosen in permutations(blobs[: len(scene.things)]):
        pairs = list(zip(scene.things, chosen, strict=False))
        colour = sum(_colour(labels, thing, blob) for thing, blob in pairs) / len(scene.things)
        shape = sum(_shape(thing, blob) for thing, blob in pairs) / len(scene.things)
        found.append(Credits(colour, shape, _place(scene, chosen, pixels.shape[0] / 32), count))
    return max(found, key=lambda credits: credits.score)


def _blobs(foreground: NDArray[np.bool_]) -> list[_Blob]:
    """Connected regions, the largest first."""
    regions, found = ndimage.label(foreground)
    blobs = []
    for region in range(1, found + 1):
        mask = regions == region
        area = int(mask.sum())
        if area >= _FEWEST_PIXELS:
            y, x = (float(c) + 0.5 for c in ndimage.center_of_mass(mask))
            blobs.append(_Blob(mask, x, y, area))
    return sorted(blobs, key=lambda b: -b.area)


def _colour(labels: NDArray[np.int64], thing: Thing, blob: _Blob) -> float:
    """The share of the blob's inner pixels that have the colour; edges are blends and do not count."""
    inner = ndimage.binary_erosion(blob.mask)
    seen = labels[inner if inner.any() else blob.mask]
    return float((seen == list(COLOURS).index(thing.colour) + 1).mean())


def _shape(thing: Thing, blob: _Blob) -> float:
    """How much better the blob fits the asked outline of its own area and centre than the other outlines, times how
    well it fits at all.

    A blob that fills the picture is no thing in it: the credit fades from half of `_LARGEST_SHARE` of the picture on.
    """
    height, width = blob.mask.shape
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5 - blob.y, torch.arange(width) + 0.5 - blob.x, indexing="ij")
    overlaps = []
    for shape in SHAPES:
        ideal = (signed_distance(shape, xs, ys, blob.area) <= 0).numpy()
        overlaps.append((ideal & blob.mask).sum() / (ideal | blob.mask).sum())
    overlap = np.array(overlaps)
    asked = SHAPES.index(thing.shape)
    weight = np.exp(35 * (overlap - overlap.max()))
    share = blob.area / (height * width)
    size = np.clip((_LARGEST_SHARE - share) / (_LARGEST_SHARE / 2), 0, 1)
    return float(weight[asked] / weight.sum() * min(1.0, overlap[asked] / 0.75) * size)


def _place(scene: Scene, chosen: tuple[_Blob, ...], scale: float) -> float:
    """1 within 3 pixels of the place, 0 from 15; or 1 if the two centres are 8 pixels apart in the asked direction and
    further than sideways, 0 if opposite.
    """
    if scene.place is not None:
        x, y = PLACES[scene.place]
        distance = float(np.hypot(chosen[0].x / scale - x, chosen[0].y / scale - y))
        return float(np.clip((15 - distance) / 12, 0, 1))
    if len(chosen) < 2:
        return 0.0
    dx, dy = RELATIONS[scene.relation or "left of"]
    gap_x, gap_y = (chosen[1].x - chosen[0].x) / scale, (chosen[1].y - chosen[0].y) / scale
    along, across = gap_x * dx + gap_y * dy, abs(gap_x * dy) + abs(gap_y * dx)
    return float(np.clip((along - 0.5 * across) / 8, 0, 1))


class ShapesReward:
    """Scores decoded pictures for sentences about shapes (`flowgrove.tiny.pictures.parse` gives the accepted form)."""

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for the first prompt that is not such a sentence."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] on any device, one prompt each → scores fp32 [B] on the CPU."""
        host = to_host(pictures.detach().float())
        return torch.tensor([score_picture(p, parse(text)).score for p, text in zip(host, prompts, strict=True)])
