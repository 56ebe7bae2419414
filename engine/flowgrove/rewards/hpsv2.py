"""HPSv2.1 (Wu et al. 2306.09341): an OpenCLIP ViT-H/14 tuned on people's preferences; the score is cos(picture,
prompt), about 0.2 to 0.4.

Its authors show the whole picture: the longer side is resized to 224 and the rest filled with black, where other CLIP
rewards cut the middle out.
"""

import torch
from torch import Tensor

from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import VIT_H, Clip, load_strictly, load_tokenizer, processor_source
from flowgrove.rewards.open_clip import clip_config, renamed
from flowgrove.rewards.preprocess import fit, read_preprocess
from flowgrove.rewards.weights import DType, Source, misfit, read_json, read_state

_MODEL, _FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
_HEADS = 16  # of both towers of ViT-H/14


class HPSv2Reward:
    """`path`: the weights, a file, or the folder or repository that holds it; `processor`: tokenizer and image settings
    (and heads, in its config.json).
    """

    def __init__(
        self,
        device: torch.device,
        path: str = _MODEL,
        processor: str = VIT_H,
        batch_size: Count = 32,
        dtype: DType = "fp32",
    ) -> None:
        from transformers import CLIPModel

        file = Source("hpsv2", "path", _MODEL, (_FILE,), _FILE).file(path)
        folder = processor_source("hpsv2", "processor", VIT_H).folder(processor)
        tokenizer = load_tokenizer("hpsv2", folder)
        written = read_json(folder / "config.json", "hpsv2") if (folder / "config.json").is_file() else {}
        text_heads, vision_heads = (
            written.get(tower, {}).get("num_attention_heads", _HEADS) for tower in ("text_config", "vision_config")
        )
        state = renamed(read_state(file, "hpsv2"))
        try:
            config = clip_config(state, text_heads, vision_heads, tokenizer.eos_token_id)
        except (KeyError, ValueError) as error:
            raise misfit("hpsv2", file, error) from None
        model = load_strictly("hpsv2", file, CLIPModel, None, config=config, state_dict=state)
        settings, side = read_preprocess(folder, "hpsv2"), config.vision_config.image_size
        self.clip = Clip(
            model, tokenizer, lambda pictures: settings.normalise(fit(pictures, side)), device, dtype, batch_size
        )

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B]."""
        return self.clip.cosines(pictures, prompts)
