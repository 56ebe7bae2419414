"""Attention backends: which are usable here, and how a transformer is told to use one.
All of them come through diffusers' attention dispatch.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import XFormersJointAttnProcessor
from torch import Tensor, nn

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.models.twins import twin
from flowgrove.recipe.schema import Model, Recipe

# ours for diffusers'; all others are diffusers' own
_NAMES = {"sdpa": "native", "flash3": "_flash_3", "cudnn": "_native_cudnn", "sdpa_flash": "_native_flash"}
# Whose backward has ended a run with an illegal memory access, after which a process can do nothing more on its GPU.
UNSAFE = ("cudnn",)
_SLOW = ("sdpa", "_native_math", "flex")  # the one that others are compared with, and two for other ends
# They take a mask's sum for a number of keys from the first on (diffusers 0.42): right for padding at the end,
# and text stands before the picture.
_FIRST_KEYS = ("flash_varlen", "_flash_varlen_3", "sage_varlen")
_INSTALL = {
    "flash": "pip install flash-attn --no-build-isolation",
    "flash_varlen": "pip install flash-attn --no-build-isolation",
    "_flash_3": "build flash-attn 3 from the hopper/ folder of github.com/Dao-AILab/flash-attention",
    "xformers": "pip install xformers",
    "sage": "pip install sageattention",
}
# Chosen by flags of the whole process while they run, which any other attention then meets, in whichever thread.
_FLAGGED = ("_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
# where a backend is asked for → how an error begins, and what to write there instead, if anything
_ASKED = {
    "engine.attention": ("engine.attention is", "auto"),
    "rollout.attention": ("rollout.attention is", "null"),
    "--modes": ("--modes names", None),
    "--attention": ("--attention is", None),
}


def use_attention(
    adapter: Adapter, wanted: str, recipe: Model, device: torch.device, splits_lengths: bool = False
) -> None:
    """Sets engine.attention on an adapter's transformer; auto leaves PyTorch's own. Raises UserError for a backend that
    cannot run or train here or on this model.

    PyTorch's own attention does without cuDNN's kernels from here on, in the whole process: on an H200 with torch 2.11
    their backward read outside its memory for one row of FLUX (PyTorch issues 122695 and 190321 tell of others).
    engine.attention: cudnn still asks for them by name.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if wanted == "auto":
        return
    check_attention(adapter, wanted, recipe, device, splits_lengths=splits_lengths)
    name = _NAMES.get(wanted, wanted)
    if _switchable(adapter):
        _take_one_dtype(name)
        adapter.transformer.set_attention_backend(name)
    elif name == "xformers":
        adapter.transformer.set_attn_processor(XFormersJointAttnProcessor())


def check_attention(
    adapter: Adapter, wanted: str, recipe: Model, device: torch.device, key: str = "engine.attention",
    splits_lengths: bool = False,
) -> None:  # fmt: skip
    """Raises UserError for a backend that cannot run here or on this model, or cannot train where engine.attention asks
    for it. `key`: one of _ASKED, where it was asked for. `splits_lengths`: engine.split_lengths.
    """
    name, (says, value) = _NAMES.get(wanted, wanted), _ASKED[key]

    def error(why: str, *instead: str) -> UserError:
        write = "leave it out" if value is None else f"write {', or '.join([*instead, value])}"
        return UserError(f"{says} {wanted}{why}{write}")

    trains = key == "engine.attention"
    if (reason := missing(wanted, device, downloads=trains)) is not None:
        raise error(f": {reason}; or ")
    masked = adapter.masks_prompts and not splits_lengths
    if masked and (_takes_no_mask(name) or name in _FIRST_KEYS):
        why = "which takes no mask" if _takes_no_mask(name) else "which takes a mask for a number of first tokens"
        split = ("engine.split_lengths: true",) if adapter.splits_texts() else ()
        raise error(f", {why}, and {recipe.adapter} masks prompts of different lengths: ", "sdpa", *split)
    if not _switchable(adapter):
        if not trains:
            raise error(f": diffusers' {recipe.adapter} transformer takes one attention kernel for all passes: ")
        if name not in ("native", "xformers"):
            raise UserError(
                f"{says} {wanted}: the {recipe.adapter} transformer of diffusers takes sdpa (which itself "
                "runs flash kernels) or xformers"
            )
        if name == "xformers" and recipe.dtype == "bf16" and recipe.lora is None:
            why = ", which wants queries and values in one dtype: with model.lora: null norms train in fp32; "
            raise error(why, "sdpa", "a model.lora")
    if trains and "sage" in name:
        raise UserError(
            f"{says} {wanted}, which has no backward: write sage for rollout.attention, whose steps do not train, and "
            "auto here"
        )
    if _wants_bf16(name) and recipe.dtype != "bf16":
        raise error(f", which takes bf16 alone, and model.dtype is {recipe.dtype}: ", "model.dtype: bf16")


def with_attention(transformer: Any, wanted: str) -> Any:
    """A transformer that shares all of another one but the backend of its attention, which `check_attention` has let.
    diffusers' own setter would set it for the whole process.
    """
    instead: dict[nn.Module, nn.Module] = {}
    name = _NAMES.get(wanted, wanted)
    _take_one_dtype(name)
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            one = copy.copy(module)
            one._modules = dict(module._modules)
            one.processor = copy.copy(module.processor)
            one.processor._attention_backend = dispatch.AttentionBackendName(name)
            instead[module] = one
    return twin(transformer, instead)


def runs_alone(recipe: Recipe) -> bool:
    """Whether nothing may compute attention beside a recipe's passes: no decoding, no reward, no text encoder."""
    wanted = (recipe.engine.attention, recipe.rollout.attention)
    return any(alone(name) for name in wanted if name is not None)


def alone(wanted: str) -> bool:
    """Whether no other attention may run while this one does."""
    return _NAMES.get(wanted, wanted) in _FLAGGED


def _take_one_dtype(name: str) -> None:
    """Has a kernel compute in the dtype of its values. CUDA's autocast computes norms in fp32, and many families norm
    queries and keys; PyTorch's own attention is cast by autocast, others refuse tensors of two dtypes.
    """
    kernels: dict[Any, Any] = dispatch._AttentionBackendRegistry._backends
    kernel = kernels[dispatch.AttentionBackendName(name)]
    if name == "native" or isinstance(kernel, _OfOneDtype):
        return
    kernels[dispatch.AttentionBackendName(name)] = _OfOneDtype(kernel)


class _OfOneDtype:
    """A kernel whose queries and keys are cast to the dtype of the values."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel = kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Any:
        return self.kernel(query=query.to(value.dtype), key=key.to(value.dtype), value=value, **others)


def _switchable(adapter: Adapter) -> bool:
    """Whether the transformer's attention goes through the dispatch."""
    modules = adapter.transformer.modules()
    return any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in modules)


def missing(wanted: str, device: torch.device, downloads: bool = True) -> str | None:
    """Why a backend cannot run on `device` and what to do; None if it can. `downloads`: whether its kernel may come
    from a hub, as diffusers' own setter of backends lets it.
    """
    name = _NAMES.get(wanted, wanted)
    known = {backend.value for backend in dispatch.AttentionBackendName}
    if name not in known:
        return f"known are {', '.join(attention_names())}"
    if name == "native":
        return None
    if "hub" in name and not downloads:
        return "kernels of a hub are downloaded for engine.attention alone: write one that is installed"
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        return f"not installed: {_INSTALL[name]}" if name in _INSTALL else " ".join(str(error).split())
    if device.type == "cpu" and name not in ("_native_math", "flex"):
        return "it needs a GPU"
    return None


def takes_no_mask(wanted: str) -> bool:
    """Whether a kernel is for rows without a mask alone."""
    return _takes_no_mask(_NAMES.get(wanted, wanted))


def _takes_no_mask(name: str) -> bool:
    return any(kernel in name for kernel in ("flash", "sage", "aiter")) and "varlen" not in name


def _wants_bf16(name: str) -> bool:
    return any(kernel in name for kernel in ("flash", "sage", "aiter", "cudnn"))


def trains_safely(name: str) -> bool:
    """Whether a backend has a backward, and one that can be trusted."""
    return "sage" not in name and name not in UNSAFE


def attention_names() -> list[str]:
    """All that engine.attention takes besides auto."""
    theirs = {ours: name for name, ours in _NAMES.items()}
    return sorted(theirs.get(backend.value, backend.value) for backend in dispatch.AttentionBackendName)


def attention_here(device: torch.device) -> list[str]:
    """The kernels that are worth measuring beside sdpa here, without those that would be downloaded."""
    return [
        name
        for name in attention_names()
        if name not in _SLOW and "varlen" not in name and missing(name, device, downloads=False) is None
    ]
