"""Attention backends: which are usable here, and how a transformer is told to use one.
All of them come through diffusers' attention dispatch.
"""

import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import XFormersJointAttnProcessor

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.recipe.schema import Model

# ours for diffusers'; all others are diffusers' own
_NAMES = {"sdpa": "native", "flash3": "_flash_3", "cudnn": "_native_cudnn"}
# Whose backward has ended a run with an illegal memory access, after which a process can do nothing more on its GPU.
UNSAFE = ("cudnn",)
_INSTALL = {
    "flash": "pip install flash-attn --no-build-isolation",
    "flash_varlen": "pip install flash-attn --no-build-isolation",
    "_flash_3": "build flash-attn 3 from the hopper/ folder of github.com/Dao-AILab/flash-attention",
    "xformers": "pip install xformers",
    "sage": "pip install sageattention",
}


def use_attention(adapter: Adapter, wanted: str, recipe: Model, device: torch.device) -> None:
    """Sets engine.attention on an adapter's transformer; auto leaves PyTorch's own. Raises UserError for a backend that
    cannot run here or on this model.

    PyTorch's own attention does without cuDNN's kernels from here on, in the whole process: on an H200 with torch 2.11
    their backward read outside its memory for one row of FLUX (PyTorch issues 122695 and 190321 tell of others).
    engine.attention: cudnn still asks for them by name.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if wanted == "auto":
        return
    name = _NAMES.get(wanted, wanted)
    if (reason := missing(wanted, device)) is not None:
        raise UserError(f"engine.attention is {wanted}: {reason}; or write auto")
    if _takes_no_mask(name):
        if adapter.masks_prompts:
            raise UserError(
                f"engine.attention is {wanted}, which takes no mask, "
                f"and {recipe.adapter} masks prompts of different lengths: write sdpa or flash_varlen"
            )
        if recipe.dtype == "bf16" and recipe.lora is None:
            raise UserError(
                f"engine.attention is {wanted}, which wants bf16 throughout: with model.lora: "
                "null norms train in fp32; write sdpa, or give a lora"
            )
    transformer = adapter.transformer
    switchable = any(
        hasattr(getattr(module, "processor", None), "_attention_backend") for module in transformer.modules()
    )
    if switchable:
        transformer.set_attention_backend(name)
    elif name == "xformers":
        transformer.set_attn_processor(XFormersJointAttnProcessor())
    elif name != "native":
        raise UserError(
            f"engine.attention is {wanted}: the {recipe.adapter} transformer of diffusers takes sdpa (which itself "
            "runs flash kernels) or xformers"
        )


def missing(wanted: str, device: torch.device) -> str | None:
    """Why a backend cannot run on `device` and what to do; None if it can."""
    name = _NAMES.get(wanted, wanted)
    known = {backend.value for backend in dispatch.AttentionBackendName}
    if name not in known:
        return f"known are {', '.join(attention_names())}"
    if name == "native":
        return None
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        return f"not installed: {_INSTALL[name]}" if name in _INSTALL else " ".join(str(error).split())
    if device.type == "cpu" and name not in ("_native_math", "flex"):
        return "it needs a GPU"
    return None


def _takes_no_mask(name: str) -> bool:
    return any(kernel in name for kernel in ("flash", "sage", "aiter")) and "varlen" not in name


def attention_names() -> list[str]:
    """All that engine.attention takes besides auto."""
    theirs = {ours: name for name, ours in _NAMES.items()}
    return sorted(theirs.get(backend.value, backend.value) for backend in dispatch.AttentionBackendName)
