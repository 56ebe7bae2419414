"""Weights in OpenCLIP's naming as a `transformers` CLIPModel.

OpenCLIP keeps query, key and value in one matrix [3·w, w] and multiplies by its projections from the right (x @ P, P
[w, d]): those are split and transposed, everything else is a matter of names. Its ViT-H/14 uses the exact GELU.
"""

import re
from typing import Any

from torch import Tensor

_TOP = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # sic
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(\w+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIPModel; names that OpenCLIP's CLIP does not have are left out."""
    new: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in _TOP:
            new[_TOP[name]] = value.reshape(()) if name == "logit_scale" else value
        elif name in _PROJECTIONS:
            new[_PROJECTIONS[name]] = value.T.contiguous()
        elif found := _BLOCK.fullmatch(name):
            visual, number, part, rest = found.groups()
            prefix = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}."
            if part == "attn" and rest.startswith("in_proj_"):
                for target, third in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                    new[f"{prefix}self_attn.{target}.{rest.removeprefix('in_proj_')}"] = third.clone()
            else:
                layer, _, kind = f"{part}.{rest}".rpartition(".")
                if layer in _IN_BLOCK:
                    new[f"{prefix}{_IN_BLOCK[layer]}.{kind}"] = value
    return new


def clip_config(state: dict[str, Tensor], text_heads: int, vision_heads: int, eos_token_id: int) -> Any:
    """The CLIPConfig whose model takes `renamed` weights; they do not show how a width is divided into heads. Raises
    KeyError if a tensor is missing, ValueError if its width is not divisible by the heads.
    """
    from transformers import CLIPConfig

    text, vision = "text_model.", "vision_model."
    patches = state[vision + "embeddings.position_embedding.weight"].shape[0] - 1
    patch = state[vision + "embeddings.patch_embedding.weight"].shape[-1]
    shared = {
        "projection_dim": state["visual_projection.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
    text_config = {
        **shared,
        **_tower(state, text, text_heads),
        "vocab_size": state[text + "embeddings.token_embedding.weight"].shape[0],
        "max_position_embeddings": state[text + "embeddings.position_embedding.weight"].shape[0],
        # only the end is looked for: the first `eos_token_id` of a text is where its embedding is read
        "bos_token_id": None,
        "pad_token_id": None,
        "eos_token_id": eos_token_id,
    }
    vision_config = {
        **shared,
        **_tower(state, vision, vision_heads),
        "patch_size": patch,
        "image_size": round(patches**0.5) * patch,
    }
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=shared["projection_dim"])


def _tower(state: dict[str, Tensor], prefix: str, heads: int) -> dict[str, int]:
    layers = {
        int(found[1]) for name in state if (found := re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", name))
    }
    intermediate, width = state[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape
    if width % heads:
        raise ValueError(f"a {prefix.removesuffix('_model.')} tower {width} wide has no {heads} heads")
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads,
    }
