"""How much of its source picture a result keeps: 100 · cos of their CLIP embeddings. An edit that changes only what was
asked for stays close; beside a reward for what was asked, it keeps a model from drawing something else.
"""

from collections import OrderedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowgrove.data.prompt import pictures_of
from flowgrove.errors import UserError, one_line
from flowgrove.models.sources import source_pictures
from flowgrove.recipe.schema import Count, Index
from flowgrove.rewards.clip import VIT_L, clip_source, load_clip
from flowgrove.rewards.weights import DType

_MOST_KEPT = 4096  # embeddings of sources


class ClipSimilarityReward:
    """`source`: the number of the source picture, from 0 on; it is cropped as the model gets it. `path`: as of
    clip_score.
    """

    def __init__(
        self,
        device: torch.device,
        source: Index = 0,
        path: str = VIT_L,
        batch_size: Count = 32,
        dtype: DType = "fp32",
    ) -> None:
        folder = clip_source("clip_similarity", "path", VIT_L).folder(path)
        self.clip = load_clip("clip_similarity", folder, folder, device, dtype, batch_size)
        self.source = source
        self._kept: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt without that source picture."""
        for prompt in prompts:
            if len(pictures_of(prompt)) <= self.source:
                what = f"{one_line(prompt, 60)!r} has {len(pictures_of(prompt))} source pictures"
                fix = f"it needs number {self.source} (source): take a model that edits pictures, and their prompts"
                raise UserError(f"reward clip_similarity: {what}, and {fix}")

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B], at most 100."""
        height, width = pictures.shape[-2:]
        distinct = {prompt: self._embedded(prompt, height, width) for prompt in dict.fromkeys(prompts)}
        return 100 * (self.clip.pictures(pictures) * torch.stack([distinct[prompt] for prompt in prompts])).sum(-1)

    def _embedded(self, prompt: str, height: int, width: int) -> Tensor:
        key = pictures_of(prompt)[self.source].identity, height, width
        if key not in self._kept:
            picture = source_pictures(prompt, height, width)[self.source]
            self._kept[key] = self.clip.pictures(_as_tensor(picture))[0]
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]


def _as_tensor(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255
