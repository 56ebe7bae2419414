"""Where a recipe's model lies: a folder, a repository in the local Hugging Face cache, or the embedded pipeline; and
the parts that such a folder names; and where a LoRA lies. Nothing is ever downloaded.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError
from flowgrove.hub import cached_snapshot
from flowgrove.recipe.schema import Expert, Model

TINY = Path(__file__).parents[1] / "tiny" / "pipeline"
ARCHITECTURES = Path(__file__).parent / "architectures"
LORA_SETTINGS = "adapter_config.json"  # of a folder that peft has written
_LORA_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # that diffusers and peft write
_REPOSITORY = r"[\w.-]+/[\w.-]+"


def model_folder(model: Model) -> Path:
    """The folder of model.path; "tiny" is the embedded pipeline, OWNER/NAME a repository that has been downloaded.
    Raises UserError if there is none.
    """
    folder = TINY if model.path == "tiny" else Path(model.path).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if not folder.exists() and re.fullmatch(_REPOSITORY, model.path):
        cached = cached_snapshot(model.path)
        if cached is None or not (cached / "model_index.json").is_file():
            raise UserError(
                f"model.path {model.path} is not on this machine: hf download {model.path}, "
                "or give the folder of a downloaded diffusers pipeline"
            )
        return cached
    raise UserError(
        f"model.path {model.path} holds no model_index.json: give the folder of a downloaded diffusers pipeline, "
        "or `tiny`"
    )


def part_names(folder: Path) -> list[str]:
    """The parts that model_index.json names, without those that it leaves out as null."""
    named = read_index(folder).items()
    return [name for name, value in named if isinstance(value, list) and value and isinstance(value[0], str)]


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json. Raises UserError if there is none."""
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): download the whole pipeline folder") from None
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{file} is no description of a pipeline: download the file anew")
    return index


def lora_file(path: str, expert: Expert | None = None) -> Path:
    """The .safetensors file of model.init_lora.path: itself, that of a folder, or of a downloaded repository.
    `expert`: of several files that of this one, by "high" or "low" in their names. Raises UserError.
    """
    place = Path(path).expanduser()
    if not place.exists() and re.fullmatch(_REPOSITORY, path):
        place = cached_snapshot(path) or place
    if place.is_dir():
        found = _of_expert(sorted(place.glob("*.safetensors")), expert)
        named = [place / name for name in _LORA_NAMES if place / name in found] or found
        if len(named) == 1 or (named and named[0].name in _LORA_NAMES):
            return named[0]
        what = f"holds {len(found)} .safetensors files: give one of them" if found else "holds no .safetensors file"
        if found and expert is not None:
            what += ", or of two experts a folder with high in the name of one and low in that of the other"
        raise UserError(f"model.init_lora.path: {place} {what}")
    if not place.is_file():
        raise UserError(f"model.init_lora.path: there is no {path}: give a .safetensors file, or the folder of one")
    if place.suffix != ".safetensors":
        raise UserError(f"model.init_lora.path: {place} is no .safetensors file: convert it, and give that")
    return place


def _of_expert(files: list[Path], expert: Expert | None) -> list[Path]:
    """The files that are named after an expert, or not after the other one."""
    if expert is None or len(files) < 2:
        return files
    other: Expert = "low" if expert == "high" else "high"
    mine = [file for file in files if _names(file, expert)]
    return mine or [file for file in files if not _names(file, other)] or files


def _names(file: Path, expert: Expert) -> bool:
    """Whether a file's name has "high" or "low" in it as a word of its own, and not as in "flow"."""
    return re.search(rf"(?<![a-z]){expert}(noise)?(?![a-z])", file.stem.lower()) is not None


def lora_digest(files: Iterable[Path]) -> str:
    """SHA-256 of LoRA files, and of peft's settings beside each. Raises UserError."""
    found = hashlib.sha256()
    for file in files:
        try:
            for one in (file, file.with_name(LORA_SETTINGS)):
                if one == file or one.is_file():
                    found.update(hashlib.sha256(one.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"model.init_lora.path: cannot read {file} ({error.strerror})") from None
    return found.hexdigest()
