"""How far a picture is from the others of its prompt: 100 · (1 − the mean cosine of their CLIP embeddings). Beside
another reward it keeps a model from drawing one picture only.
"""

from typing import ClassVar

import torch
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import VIT_L, clip_source, load_clip
from flowgrove.rewards.faults import groups_of
from flowgrove.rewards.weights import DType


class DiversityReward:
    """`path`: as of clip_score."""

    groupwise: ClassVar = True
    fewest: ClassVar = 2

    def __init__(self, device: torch.device, path: str = VIT_L, batch_size: Count = 32, dtype: DType = "fp32") -> None:
        folder = clip_source("diversity", "path", VIT_L).folder(path)
        self.clip = load_clip("diversity", folder, folder, device, dtype, batch_size)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1], neighbours of one prompt being its group → scores fp32 [B], from 0 on."""
        embeddings = self.clip.pictures(pictures)
        return torch.cat([_apart(embeddings[group]) for group in groups_of(prompts)])


def _apart(embeddings: Tensor) -> Tensor:
    """[G, D] → [G]."""
    if len(embeddings) < DiversityReward.fewest:
        raise UserError("reward diversity compares the pictures of a prompt, which has one: draw two or more of each")
    others = (embeddings @ embeddings.T).sum(1) - (embeddings * embeddings).sum(1)
    return 100 * (1 - others / (len(embeddings) - 1))
