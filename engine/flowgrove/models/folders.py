"""Where a recipe's model lies: a folder, a repository in the local Hugging Face cache, or the embedded pipeline; and
the parts that such a folder names. Nothing is ever downloaded.
"""

import json
import re
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError
from flowgrove.hub import cached_snapshot
from flowgrove.recipe.schema import Model

TINY = Path(__file__).parents[1] / "tiny" / "pipeline"
ARCHITECTURES = Path(__file__).parent / "architectures"


def model_folder(model: Model) -> Path:
    """The folder of model.path; "tiny" is the embedded pipeline, OWNER/NAME a repository that has been downloaded.
    Raises UserError if there is none.
    """
    folder = TINY if model.path == "tiny" else Path(model.path).expanduser()
    if (folder / "model_index.json").is_file():
        return folder
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", model.path):
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
    return [name for name, value in named if isinstance(value, list) and value[:1] not in ([], [None])]


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
