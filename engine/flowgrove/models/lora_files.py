"""LoRA layers as files that other programs read: diffusers, and ComfyUI.

Loaders that find no alpha take it to be the rank. So B is written scaled by alpha / rank, and alpha as the rank: every
loader draws at full strength.
"""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.experts import expert_of
from flowgrove.models.stored import rounded
from flowgrove.recipe.schema import Expert, Lora

FORMATS = ("diffusers", "comfyui")
COMFYUI_FILE = "comfyui_lora.safetensors"
# Loaders take one expert's layers at a time, from a file each, under the same names. The first name for diffusers is
# the one that `load_lora_weights` takes of a folder.
_FILES: dict[str, dict[Expert | None, str]] = {
    "diffusers": {
        None: "pytorch_lora_weights.safetensors",
        "high": "pytorch_lora_weights.safetensors",
        "low": "pytorch_lora_weights_low_noise.safetensors",
    },
    "comfyui": {
        None: COMFYUI_FILE,
        "high": "comfyui_lora_high_noise.safetensors",
        "low": "comfyui_lora_low_noise.safetensors",
    },
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
    """Writes `layers` of a family of adapters into `folder` in one of FORMATS, a file for each expert; `dtype` None: as
    they are.

    Raises UserError for modules that ComfyUI does not know.
    """
    scale = lora.alpha / lora.rank
    scaled = {name: tensor * scale if name.endswith(".lora_B.weight") else tensor for name, tensor in layers.items()}
    by_expert: dict[Expert | None, dict[str, Tensor]] = {}
    for name, tensor in scaled.items():
        expert, place = expert_of(name)
        by_expert.setdefault(expert, {})[place] = rounded(name, tensor, dtype).contiguous()
    folder.mkdir(parents=True)
    for expert, some in by_expert.items():
        if form == "diffusers":
            targets = lora.targets or list(family.lora_targets)
            settings = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=targets).to_dict()
            lora_loader(family).save_lora_weights(
                folder,
                transformer_lora_layers=some,
                transformer_lora_adapter_metadata=settings,
                weight_name=_FILES[form][expert],
            )
        else:
            save_file(_for_comfyui(some, lora, family), folder / _FILES[form][expert], metadata={"format": "pt"})


def _for_comfyui(layers: dict[str, Tensor], lora: Lora, family: Any) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in layers.items():
        module, half = name.removesuffix(".weight").rsplit(".", 1)
        place = comfyui_name(family, module)
        tensors[f"{place}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{place}.alpha"] = torch.tensor(float(lora.rank))
    return tensors


def loads_lora(family: Any) -> bool:
    """Whether diffusers' pipeline loads LoRA files itself; where it does not, its transformer does."""
    return hasattr(family.pipeline_class(), "load_lora_weights")


def lora_loader(family: Any) -> Any:
    """The class of diffusers that reads and writes a family's files, under the names that all its pipelines use."""
    return family.pipeline_class() if loads_lora(family) else CogVideoXLoraLoaderMixin


def how_to_load(folder: Path, form: str, layers: dict[str, Tensor], family: Any) -> str:
    """What to do with the files that `write_lora` has written."""
    experts = list(dict.fromkeys(expert_of(name)[0] for name in layers))
    if form == "comfyui":
        files = " and ".join(str(folder / _FILES[form][expert]) for expert in experts)
        return f"wrote a LoRA for ComfyUI: copy {files} into its models/loras folder"
    if not loads_lora(family):
        return f'wrote a LoRA: pipe.transformer.load_lora_adapter("{folder}", use_safetensors=True)'
    calls = [
        f'pipe.load_lora_weights("{folder}")'
        if expert != "low"
        else f'pipe.load_lora_weights("{folder}", weight_name="{_FILES[form][expert]}", load_into_transformer_2=True)'
        for expert in experts
    ]
    return f"wrote a LoRA: {' and '.join(calls)}"


def comfyui_name(family: Any, module: str) -> str:
    """What ComfyUI's loader calls a module of a family's transformer.
    Raises UserError for one that it has no name for.
    """
    name: str | None = family.comfyui_name(module)
    if name is None:
        what = f"ComfyUI has no name for the layer on {module} (model.lora.targets)"
        raise UserError(f"--format comfyui: {what}: write --format diffusers")
    return name
