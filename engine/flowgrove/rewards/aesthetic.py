"""LAION's improved aesthetic predictor (Schuhmann et al. 2210.08402): how much people like a picture, about 1 to 10,
whatever its prompt.

A stack of linear layers (768 → 1024 → 128 → 64 → 16 → 1) on the unit image embedding of OpenAI's CLIP ViT-L/14.
"""

import torch
from torch import Tensor

from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import VIT_L, clip_source, load_clip
from flowgrove.rewards.linear_head import LinearHead
from flowgrove.rewards.weights import DType, Source, read_state

_HEAD, _FILE = "camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"


class AestheticReward:
    """`path`: the predictor's weights, a file, or the folder or repository that holds it; `clip`:
    the CLIP whose embeddings it reads.
    """

    def __init__(
        self, device: torch.device, path: str = _HEAD, clip: str = VIT_L, batch_size: Count = 32, dtype: DType = "fp32"
    ) -> None:
        file = Source("aesthetic", "path", _HEAD, (f"{_FILE}|*.pth|*.safetensors",), _FILE).file(path)
        folder = clip_source("aesthetic", "clip", VIT_L).folder(clip)
        self.clip = load_clip("aesthetic", folder, folder, device, dtype, batch_size)
        self.head = LinearHead(
            read_state(file, "aesthetic"), self.clip.model.config.projection_dim, device, "aesthetic", file
        )

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B]."""
        return self.head(self.clip.pictures(pictures))
