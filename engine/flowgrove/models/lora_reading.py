"""LoRA files that other programs have written, as layers of a family's transformer.

Names are those of diffusers and peft, kohya's flat ones of the same modules, and ComfyUI's as `lora_files` writes them;
what is left goes through diffusers' own converter of the family's pipeline.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from flowgrove.errors import UserError
from flowgrove.models.folders import LORA_SETTINGS
from flowgrove.models.lora_files import lora_loader
from flowgrove.models.parts import is_of_a_library

_METADATA = "lora_adapter_metadata"  # where diffusers puts peft's settings, under names that begin with the part's
_A, _B = ("lora_A", "lora_down", "lora.down"), ("lora_B", "lora_up", "lora.up")
_KEY = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _A + _B))})(?:\.default)?\.weight")
_ALPHA = ".alpha"
_PREFIXES = ("", "transformer.", "base_model.model.", "diffusion_model.")
_TEXT = ("text_encoder", "lora_te")
_SCALED = re.compile(r"dora_scale|magnitude")  # what diffusers leaves out of a file with a warning


class Layer(NamedTuple):
    """What a LoRA does to a module: its weight changes by scale · B A, of `a` [rank, in] and `b` [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B, rows of A."""
        return self.a.shape[0]


def read_lora(file: Path, family: Any, modules: Iterable[str]) -> dict[str, Layer]:
    """The layers in `file` by the names of the transformer's linear `modules`. Raises UserError naming the first key
    that is no LoRA layer of one of them.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.init_lora.path: cannot read {file} ({error}): get the file anew") from None
    if foreign := next((key for key in tensors if key.startswith(_TEXT)), None):
        what = f"{file} holds {foreign}, a LoRA layer of a text encoder, which would be lost"
        raise UserError(f"model.init_lora: {what}: give a file of the transformer's layers alone")
    names = _names(family, modules)
    halves, alphas, unknown = _sorted_out(tensors, names)
    scale_of = _settings(file, metadata)
    if scaled := next((key for key in unknown if _SCALED.search(key)), None):
        _refuse(file, family, scaled)
    if unknown:
        halves, alphas, unknown = _sorted_out(_converted(file, family, tensors, unknown[0]), names)
        scale_of = _full_strength
    if unknown or not halves:
        _refuse(file, family, unknown[0] if unknown else None)
    layers = {}
    for module, half in halves.items():
        if len(half) < 2:
            here, other = ("A", "B") if "a" in half else ("B", "A")
            raise UserError(f"model.init_lora: {file} holds a lora_{here} of {module} and no lora_{other}: get it anew")
        rank = half["a"].shape[0]
        scale = alphas[module] / rank if module in alphas else scale_of(module, rank)
        layers[module] = Layer(half["a"], half["b"], scale)
    return layers


def _names(family: Any, modules: Iterable[str]) -> dict[str, str]:
    """What files call modules → their names."""
    found: dict[str, str] = {}
    for module in modules:
        found |= {f"{prefix}{module}": module for prefix in _PREFIXES}
        found[f"lora_unet_{module.replace('.', '_')}"] = module
        if (comfyui := family.comfyui_name(module)) is not None:
            found[comfyui] = module
    return found


def _sorted_out(
    tensors: dict[str, Tensor], names: dict[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], list[str]]:
    """{module: {"a": tensor, "b": tensor}}, {module: alpha}, and keys that are neither."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = names.get(match[1] if match else key.removesuffix(_ALPHA))
        if module is not None and match and tensor.ndim == 2:
            halves.setdefault(module, {})["a" if match[2] in _A else "b"] = tensor
        elif module is not None and key.endswith(_ALPHA) and tensor.numel() == 1:
            alphas[module] = float(tensor)
        else:
            unknown.append(key)
    return halves, alphas, unknown


def _converted(file: Path, family: Any, tensors: dict[str, Tensor], unknown: str) -> dict[str, Tensor]:
    """The tensors under diffusers' names, with B or A scaled by alpha. Raises UserError naming `unknown`."""
    try:
        found: dict[str, Tensor] = lora_loader(family).lora_state_dict(dict(tensors))
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        _refuse(file, family, unknown)
    return found


def _refuse(file: Path, family: Any, key: str | None) -> NoReturn:
    what = "no LoRA layers" if key is None else f"{key}, which is no LoRA layer of this {family.pipeline}'s transformer"
    raise UserError(f"model.init_lora: {file} holds {what}: give a LoRA that was made for this model")


def _full_strength(module: str, rank: int) -> float:
    """The scale of layers that bring no alpha."""
    return 1.0


def _settings(file: Path, metadata: dict[str, str]) -> Callable[[str, int], float]:
    """(module, rank) → alpha / rank, as peft's settings in the file, or beside it, say. Raises UserError for a kind of
    LoRA that is no scale · B A.
    """
    beside = file.with_name(LORA_SETTINGS)
    try:
        if _METADATA in metadata:
            told = json.loads(metadata[_METADATA])
            told = {key.removeprefix("transformer."): value for key, value in told.items()}
        elif beside.is_file():
            told = json.loads(beside.read_text(encoding="utf-8"))
        else:
            return _full_strength
        if kind := next((key for key in ("use_dora", "lora_bias") if told.get(key)), None):
            raise UserError(f"model.init_lora: {file} is a LoRA with {kind}: give a plain one")
        alpha, patterns, root = float(told["lora_alpha"]), dict(told.get("alpha_pattern") or {}), told.get("use_rslora")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        place = "its metadata" if _METADATA in metadata else beside.name
        raise UserError(f"model.init_lora: {file}: {place} is no description of a LoRA: get it anew") from None

    def scale(module: str, rank: int) -> float:
        own = next((value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", module)), alpha)
        return float(own) / (rank**0.5 if root else rank)

    return scale
