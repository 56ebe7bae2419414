"""Where a recipe's model lies."""

from pathlib import Path

from flowgrove.errors import UserError
from flowgrove.recipe import Model

TINY = Path(__file__).parents[1] / "tiny" / "pipeline"


def model_folder(model: Model) -> Path:
    """The folder of model.path; "tiny" is the embedded pipeline. Raises UserError if there is none."""
    folder = TINY if model.path == "tiny" else Path(model.path).expanduser()
    if not (folder / "model_index.json").is_file():
        raise UserError(f"model.path {model.path} holds no model_index.json: give the folder of a downloaded diffusers pipeline, or `tiny`")
    return folder
