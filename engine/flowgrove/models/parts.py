"""The parts of a pipeline folder, loaded one by one and checked.

Libraries give what a damaged folder lacks random weights or an empty vocabulary, and say nothing: a run would train on
noise.
"""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError
from flowgrove.hub import DATA_ONLY, endless_count, named_program
from flowgrove.models.adapter import text_tokenizer
from flowgrove.models.folders import read_index

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
_KINDS: tuple[type, ...] = (  # neither whole pipelines nor Auto classes, which may look for a program in the folder
    diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase,
    transformers.FeatureExtractionMixin, transformers.ImageProcessingMixin, transformers.ProcessorMixin,
    diffusers.BaseGuidance,
)  # fmt: skip
# Of the same shape, letter by letter: a tokenizer that has lost its vocabulary gives both the same ids.
_PROBES = ("a red circle", "a big square")
_POINTER = b"version https://git-lfs"


def part_class(folder: Path, name: str) -> Any:
    """The class that model_index.json gives a part. Raises UserError unless diffusers or transformers has it."""
    value: Any = read_index(folder).get(name)
    fits = isinstance(value, list) and len(value) == 2 and value[0] in _LIBRARIES and isinstance(value[1], str)
    kind = getattr(_LIBRARIES[value[0]], value[1], None) if fits else None
    if not isinstance(kind, type) or not issubclass(kind, _KINDS):
        what = f"{value[1]} as the {name}, which {value[0]} does not have" if fits else f"{value!r} as the {name}"
        fix = "download the file anew, or install the versions that the model was made for"
        raise UserError(f"{folder / 'model_index.json'} names {what}: {fix}")
    return kind


def load_part(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One part: a model with all of its weights, a tokenizer or a scheduler.

    Raises UserError that names the part, and the tensor if one is at fault.
    """
    kind, place = part_class(folder, name), folder / name
    if not place.is_dir():
        what = f"{folder} has no folder {name}, which its model_index.json names"
        raise UserError(f"{what}: download the whole pipeline folder")
    if (program := named_program(place)) is not None:
        what = f"{place / 'config.json'} names {program} as its attention, a program that would be downloaded"
        raise UserError(f"{what}: remove it")
    check_counts(place)
    try:
        if not issubclass(kind, torch.nn.Module):
            auto = issubclass(kind, transformers.ProcessorMixin)  # its parts are of Auto classes
            return kind.from_pretrained(place, **(DATA_ONLY if auto else {"local_files_only": True}))
        options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
        if issubclass(kind, transformers.PreTrainedModel):  # diffusers names the tensor itself
            part, found = kind.from_pretrained(place, dtype=dtype, ignore_mismatched_sizes=True, **options)
        else:
            part, found = kind.from_pretrained(place, torch_dtype=dtype, **options)
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        what = f"{place} does not load as a {kind.__name__}: {_reason(error, place)}"
        raise UserError(_pointer(place) or what) from None
    _check_tensors(place, kind, found)
    return part


def model_from_config(folder: Path, part: str) -> Any:
    """An untrained model of a part's class and configuration. Raises UserError."""
    kind, file = part_class(folder, part), folder / part / "config.json"
    check_counts(file.parent)
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise ValueError(f"it is that of a {config['_class_name']}")
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(kind.config_class.from_dict(config))
        return kind.from_config(config)
    except Exception as error:  # what libraries raise over foreign settings has many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} describes no {kind.__name__} ({reason}): download the folder anew") from None


def check_counts(place: Path) -> None:
    """Raises UserError where a part's configuration asks for more layers than any model has."""
    if (count := endless_count(place)) is not None:
        raise UserError(f"{place / 'config.json'} says {count}, which no model has: download the file anew")


def check_tokenizer(place: Path, tokenizer: Any, encoder: Any) -> None:
    """Raises UserError unless two texts get different tokens, and tokens that the encoder knows."""
    tokenizer = text_tokenizer(tokenizer)
    if not (place / "tokenizer_config.json").is_file():
        raise UserError(f"{place} has no tokenizer_config.json: download the whole pipeline folder")
    try:
        first, second = (list(tokenizer(text).input_ids) for text in _PROBES)
        every = tokenizer.get_vocab().values()
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        what = f"{place} holds a tokenizer that reads no text: {_reason(error, place)}"
        raise UserError(f"{what}; download the folder anew") from None
    if first == second:
        what = f"{place} holds a tokenizer without its vocabulary, to which all texts are alike"
        raise UserError(_pointer(place) or f"{what}: download the whole folder")
    longest, most = tokenizer.model_max_length, math.inf
    if isinstance(encoder, transformers.CLIPPreTrainedModel):  # texts are padded to it
        most = encoder.config.max_position_embeddings
    if not isinstance(longest, int | float) or not 2 <= longest <= most:
        file = place / "tokenizer_config.json"
        what = f"{file} says model_max_length {longest!r}, where the encoder reads {most} tokens"
        raise UserError(f"{what}: download the file anew")
    known = encoder.get_input_embeddings().num_embeddings
    foreign = max((*first, *second, *every), default=0)
    if foreign >= known:
        what = f"it gives the token {foreign}, and the text encoder knows {known}"
        raise UserError(f"{place} holds a tokenizer of another model: {what}")


def check_statistics(place: Path, vae: Any, names: tuple[str, ...]) -> None:
    """Raises UserError unless the VAE's configuration has finite numbers of these names, or a list, one per channel."""
    for name in names:
        value = vae.config.get(name)
        numbers = value if isinstance(value, list | tuple) and len(value) == vae.config.get("z_dim") else [value]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            file = place / "config.json"
            what = f"{name} is not a finite number for each channel of the latents"
            raise UserError(f"{file}: {what}: download the file anew")


def is_of_a_library(error: BaseException) -> bool:
    """Whether it says what is wrong with a file, in one of the many types that libraries use.

    Not so: that the user stops, or that memory is full.
    """
    if isinstance(error, UserError | MemoryError) or is_out_of_memory(error):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"  # Rust's, in tokenizers


def is_quantised(place: Path) -> bool:
    """Whether a part's configuration says that its weights are quantised."""
    try:
        return "quantization_config" in json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _check_tensors(place: Path, kind: Any, found: dict[str, Any]) -> None:
    for what, title in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "holds, and the model has not,"),
        ("mismatched_keys", "holds in another shape"),
    ):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in found.get(what) or ())
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            whole = f"its files are not those of a whole {kind.__name__}"
            raise UserError(f"{place} {title} {names[0]}{more}: {whole}; download the folder anew")


def _reason(error: BaseException, place: Path) -> str:
    text = " ".join(str(error).split()).split(" If you want to instead")[0][:300] or type(error).__name__
    if isinstance(error, ImportError) and is_quantised(place):
        return f"it is stored quantised (quantization_config), and the library for it is not installed: {text}"
    suffixes = {file.suffix for file in place.iterdir()}
    if ".safetensors" not in suffixes and suffixes & {".bin", ".pt", ".pth", ".ckpt"}:
        return f"its weights are a pickle, which can hold programs: get or make a .safetensors of them ({text})"
    return text


def _pointer(place: Path) -> str | None:
    """What to say of a file that is a Git LFS pointer. Asked after a failure: files of variants may stay pointers."""
    for file in sorted(place.iterdir()):
        if file.is_file() and file.stat().st_size <= 1024 and file.read_bytes().startswith(_POINTER):
            what = f"{file} is a Git LFS pointer instead of the file"
            return f"{what}: run `git lfs pull` in {place.parent}, or hf download"
    return None
