"""PickScore (Kirstain et al. 2305.01569): a CLIP ViT-H/14 tuned on people's choices, exp(logit_scale) · cos(picture,
prompt).

Divided by 100, the trained scale, so that it reads like the published tables (about 0.22).
"""

import torch
from torch import Tensor

from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import VIT_H, load_clip, model_source, processor_source
from flowgrove.rewards.weights import DType

_MODEL = "yuvalkirstain/PickScore_v1"


class PickScoreReward:
    """`path`: the tuned model; `processor`: the tokenizer and image settings of the CLIP that it was tuned from."""

    def __init__(
        self,
        device: torch.device,
        path: str = _MODEL,
        processor: str = VIT_H,
        batch_size: Count = 32,
        dtype: DType = "fp32",
    ) -> None:
        model = model_source("pickscore", "path", _MODEL).folder(path)
        reader = processor_source("pickscore", "processor", VIT_H).folder(processor)
        self.clip = load_clip("pickscore", model, reader, device, dtype, batch_size)

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B]."""
        return self.clip.model.logit_scale.float().exp() / 100 * self.clip.cosines(pictures, prompts)
