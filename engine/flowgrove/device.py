"""Which device a run uses."""

import torch

from flowgrove.errors import UserError
from flowgrove.recipe import Recipe


def pick_device(recipe: Recipe) -> torch.device:
    """engine.device, with `auto`: a CUDA GPU if there is one. Raises UserError for a GPU that is not there."""
    wanted = recipe.engine.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device is cuda, but torch sees no GPU here: write auto or cpu, or install a CUDA build of torch")
    return torch.device(wanted)
