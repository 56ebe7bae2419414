"""ImageReward (Xu et al. 2304.05977): BLIP reads the picture (ViT-L/16) and, attending to it, the prompt (BERT). A
linear head on its first token gives r, the score is (r − mean) / std over the authors' validation set. Bad pictures are
near −2, good ones near 2.

The weights file keeps BLIP's own names; `transformers` has the same network under others. ViT layers end with ε = 1e-6,
BERT's with 1e-12.
"""

import re
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import to_device
from flowgrove.recipe.schema import Count
from flowgrove.rewards.clip import load_strictly, load_tokenizer
from flowgrove.rewards.linear_head import LinearHead
from flowgrove.rewards.preprocess import Preprocess
from flowgrove.rewards.weights import DTYPES, DType, Source, misfit, read_json, read_state

_MODEL, _TOKENIZER = "zai-org/ImageReward", "google-bert/bert-base-uncased"
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_WORDS = 35  # tokens of a prompt that the model was trained to read
_HEAD_WIDTH = 64  # of a ViT attention head

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


class ImageRewardReward:
    """`path`: the folder or repository with ImageReward.pt and med_config.json; `tokenizer`: BERT's, uncased."""

    def __init__(
        self,
        device: torch.device,
        path: str = _MODEL,
        tokenizer: str = _TOKENIZER,
        batch_size: Count = 32,
        dtype: DType = "fp32",
    ) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        folder = Source(
            "image_reward", "path", _MODEL, ("ImageReward.pt", "med_config.json"), "ImageReward.pt med_config.json"
        ).folder(path)
        words = Source(
            "image_reward",
            "tokenizer",
            _TOKENIZER,
            ("tokenizer.json|vocab.txt",),
            '--include "*.json" --include "*.txt"',
        ).folder(tokenizer)
        file = folder / "ImageReward.pt"
        state, settings = read_state(file, "image_reward"), read_json(folder / "med_config.json", "image_reward")
        vision, text = vision_state(state), _below(state, "blip.text_encoder.")
        try:
            configs = _configs(vision, text, settings)
        except (KeyError, ValueError) as error:
            raise misfit("image_reward", file, error) from None
        towers = []
        for tower, weights, config, more in (
            (BlipVisionModel, vision, configs[0], {}),
            (BlipTextModel, text, configs[1], {"add_pooling_layer": False}),
        ):
            model = load_strictly("image_reward", file, tower, None, config=config, state_dict=weights, **more)
            towers.append(model.to(device, DTYPES[dtype]).eval().requires_grad_(False))
        self.vision, self.text = towers
        self.head = LinearHead(_below(state, "mlp."), configs[1].hidden_size, device, "image_reward", file)
        self.tokenizer = load_tokenizer("image_reward", words)
        side = configs[0].image_size
        self.preprocess = Preprocess(side, (side, side), (side, side))
        self.device, self.batch_size = device, batch_size

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W] in [0, 1] → scores fp32 [B]."""
        scores = []
        for some, start in zip(pictures.split(self.batch_size), range(0, len(prompts), self.batch_size), strict=True):
            words = self.tokenizer(
                prompts[start : start + self.batch_size],
                padding="max_length",
                truncation=True,
                max_length=_WORDS,
                return_tensors="pt",
            )
            numbers, mask = (to_device(tensor, self.device) for tensor in (words.input_ids, words.attention_mask))
            pixels = self.preprocess(to_device(some, self.device).float()).to(self.vision.dtype)
            seen = self.vision(pixel_values=pixels).last_hidden_state
            read = self.text(input_ids=numbers, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
            scores.append((self.head(read[:, 0].float()) - _MEAN) / _STD)
        return torch.cat(scores)


def vision_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """blip.visual_encoder.* as a BlipVisionModel names it."""
    new = {}
    for name, value in _below(state, "blip.visual_encoder.").items():
        if name in _VISION:
            new[_VISION[name]] = value
        elif found := _BLOCK.fullmatch(name):
            number, layer, kind = found.groups()
            new[f"encoder.layers.{number}.{_IN_BLOCK.get(layer, layer)}.{kind}"] = value
    return new


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }


def _configs(vision: dict[str, Tensor], text: dict[str, Tensor], settings: dict[str, Any]) -> tuple[Any, Any]:
    """Sizes come from the tensors, what tensors do not show from med_config.json."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width = vision["embeddings.patch_embedding.weight"].shape[0]
    patch = vision["embeddings.patch_embedding.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("self_attn.qkv.weight") for name in vision),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        patch_size=patch,
        image_size=round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch,
        layer_norm_eps=1e-6,
    )
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("crossattention.self.query.weight") for name in text),
        num_attention_heads=settings["num_attention_heads"],
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        hidden_act=settings["hidden_act"],
        layer_norm_eps=settings["layer_norm_eps"],
        is_decoder=True,  # builds the cross-attention; texts are read in both directions all the same
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return vision_config, text_config
