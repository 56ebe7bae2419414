"""LoRA layers as files that other programs read: diffusers, and ComfyUI.

Loaders that find no alpha take it to be the rank. So B is written scaled by alpha / rank, and alpha as the rank: every
loader draws at full strength.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.stored import rounded
from flowgrove.recipe.schema import Lora

FORMATS = ("diffusers", "comfyui")
COMFYUI_FILE = "comfyui_lora.safetensors"

# Modules whose layers ComfyUI finds by their names in diffusers, behind "transformer." (its comfy/lora.py)
_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_TIMES = r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]"
_EMBEDDERS = rf"context_embedder|proj_out|norm_out\.linear|{_TIMES}"
_JOINT = rf"({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
_QWEN_BLOCK = rf"({_ATTENTION}|(img|txt)_(mlp\.net\.(0\.proj|2)|mod\.1))"
_BY_DIFFUSERS_NAME = {
    "StableDiffusion3Pipeline": rf"transformer_blocks\.\d+\.({_JOINT}|attn2\.(to_[qkv]|to_out\.0))"
    rf"|pos_embed\.proj|{_EMBEDDERS}",
    "FluxPipeline": rf"transformer_blocks\.\d+\.{_JOINT}|x_embedder|{_EMBEDDERS}"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
    "QwenImagePipeline": rf"transformer_blocks\.\d+\.{_QWEN_BLOCK}|img_in|txt_in|proj_out|norm_out\.linear"
    r"|time_text_embed\.timestep_embedder\.linear_[12]",
}
# Wan's own names for diffusers', behind "diffusion_model."
_WAN_LAYERS = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img",
    "net.0.proj": "0", "net.2": "2",
}  # fmt: skip
_WAN_GROUPS = {"attn1": "self_attn", "attn2": "cross_attn", "ffn": "ffn"}
_WAN_OTHERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}


def layers_of(weights: dict[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The LoRA layers of trained weights as peft names them in files. Raises ValueError if they are not `lora`'s."""
    layers = {re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name): tensor for name, tensor in weights.items()}
    for name, tensor in layers.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        rank = tensor.shape[0 if match and match[2] == "A" else 1] if tensor.ndim > 1 else 0
        other = f"{match[1]}.lora_{'B' if match[2] == 'A' else 'A'}.weight" if match else ""
        if rank != lora.rank or other not in layers:
            raise ValueError(f"{name} is no LoRA layer of rank {lora.rank}")
    return layers


def write_lora(
    folder: Path,
    form: str,
    layers: dict[str, Tensor],
    lora: Lora,
    family: Any,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `layers` of a family of adapters into `folder` in one of FORMATS; `dtype` None: as they are.

    Raises UserError for modules that ComfyUI does not know.
    """
    scale = lora.alpha / lora.rank
    scaled = {name: tensor * scale if name.endswith(".lora_B.weight") else tensor for name, tensor in layers.items()}
    scaled = {name: rounded(name, tensor, dtype).contiguous() for name, tensor in scaled.items()}
    if form == "diffusers":
        pipeline: type[DiffusionPipeline] = family.pipeline
        targets = lora.targets or list(family.lora_targets)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets).to_dict()
        pipeline.save_lora_weights(folder, transformer_lora_layers=scaled, transformer_lora_adapter_metadata=settings)
        return
    tensors = {}
    for name, tensor in scaled.items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        place = comfyui_name(family.pipeline.__name__, module)
        tensors[f"{place}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{place}.alpha"] = torch.tensor(float(lora.rank))
    folder.mkdir(parents=True)
    save_file(tensors, folder / COMFYUI_FILE, metadata={"format": "pt"})


def comfyui_name(pipeline: str, module: str) -> str:
    """What ComfyUI's loader calls a module of a diffusers transformer.
    Raises UserError for one that it has no name for.
    """
    if pipeline == "WanPipeline":
        block = re.fullmatch(r"(blocks\.\d+)\.(attn1|attn2|ffn)\.(.+)", module)
        if block is not None and block[3] in _WAN_LAYERS:
            return f"diffusion_model.{block[1]}.{_WAN_GROUPS[block[2]]}.{_WAN_LAYERS[block[3]]}"
        if module in _WAN_OTHERS:
            return f"diffusion_model.{_WAN_OTHERS[module]}"
    elif re.fullmatch(_BY_DIFFUSERS_NAME[pipeline], module):
        return f"transformer.{module}"
    what = f"ComfyUI has no name for the layer on {module} (model.lora.targets)"
    raise UserError(f"--format comfyui: {what}: write --format diffusers")
