"""How well a picture fits its prompt: 100 · cos of their CLIP embeddings (CLIPScore, Hessel et al.
2104.08718, without its clipping at 0).
"""

import torch
from torch import Tensor

from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import VIT_L, clip_source, load_clip
from flowgrove.rewards.weights import DType


class ClipScoreReward:
    """`path`: any CLIP of `transformers` with its processor, as a folder or a repository of the hub cache."""

    def __init__(self, device: torch.device, path: str = VIT_L, batch_size: Count = 32, dtype: DType = "fp32") -> None:
        folder = clip_source("clip_score", "path", VIT_L).folder(path)
        self.clip = load_clip("clip_score", folder, folder, device, dtype, batch_size)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B], at most 100."""
        return 100 * self.clip.cosines(pictures, prompts)
