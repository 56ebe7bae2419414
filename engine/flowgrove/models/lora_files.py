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
        pipeline: type[DiffusionPipeline] = family.pipeline_class()
        targets = lora.targets or list(family.lora_targets)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets).to_dict()
        pipeline.save_lora_weights(folder, transformer_lora_layers=scaled, transformer_lora_adapter_metadata=settings)
        return
    tensors = {}
    for name, tensor in scaled.items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        place = comfyui_name(family, module)
        tensors[f"{place}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{place}.alpha"] = torch.tensor(float(lora.rank))
    folder.mkdir(parents=True)
    save_file(tensors, folder / COMFYUI_FILE, metadata={"format": "pt"})


def comfyui_name(family: Any, module: str) -> str:
    """What ComfyUI's loader calls a module of a family's transformer.
    Raises UserError for one that it has no name for.
    """
    name: str | None = family.comfyui_name(module)
    if name is None:
        what = f"ComfyUI has no name for the layer on {module} (model.lora.targets)"
        raise UserError(f"--format comfyui: {what}: write --format diffusers")
    return name
