"""Where a recipe's model lies: a folder, a repository in the local Hugging Face cache, or the embedded pipeline.
Nothing is ever downloaded.
"""

import re
from pathlib import Path

from flowgrove.errors import UserError
from flowgrove.hub import cached_snapshot
from flowgrove.recipe.schema import Model

TINY = Path(__file__).parents[1] / "tiny" / "pipeline"
ARCHITECTURES = Path(__file__).parent / "architectures"
_KNOWN = {
    "black-forest-labs/FLUX.1-dev": "flux1_dev",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "Qwen/Qwen-Image": "qwen_image",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan21_1_3b",
}


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


def configuration_folder(model: Model) -> Path:
    """The same where configuration files are enough:
    models that published recipes train need not be downloaded for it. Raises UserError.
    """
    try:
        return model_folder(model)
    except UserError:
        if model.path not in _KNOWN:
            raise
        return ARCHITECTURES / _KNOWN[model.path]
