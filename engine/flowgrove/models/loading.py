"""From a recipe to its model on the device: which family,
and its text encoders before the rest and only as long as they are needed.
"""

from collections.abc import Iterable

import diffusers
import torch

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.models.embeddings import (
    MOST_UNASKED,
    Encoder,
    LoadedEncoder,
    OffloadedEncoder,
    StoredEncoder,
    TooManyPromptsError,
    cache_folder,
    warn_of_cut_prompts,
)
from flowgrove.models.flux import Flux
from flowgrove.models.folders import model_folder
from flowgrove.models.geometry import read_geometry
from flowgrove.models.parts import is_of_a_library
from flowgrove.models.qwen_image import QwenImage
from flowgrove.models.sd3 import SD3
from flowgrove.models.wan import Wan
from flowgrove.recipe.schema import Recipe

ADAPTERS: dict[str, type[Adapter]] = {"sd3": SD3, "flux": Flux, "qwen_image": QwenImage, "wan": Wan}


def load_model(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, texts: Iterable[str] | None
) -> tuple[Adapter, Encoder]:
    """The adapter and what encodes its prompts; `texts` are those that will be asked for, None: none, and nothing will
    be decoded. Raises UserError.
    """
    model, folder, family = recipe.model, model_folder(recipe.model), ADAPTERS[recipe.model.adapter]
    diffusers.utils.logging.disable_progress_bar()

    def load(place: torch.device, without: tuple[str, ...] = ()) -> Adapter:
        try:
            return family.load(folder, model, place, dtype, without)
        except BaseException as error:
            if not is_of_a_library(error):
                raise
            raise UserError(
                f"model.path {model.path} does not load as a {model.adapter} pipeline: "
                f"{' '.join(str(error).split())[:300]}"
            ) from None

    def load_encoders(place: torch.device) -> Adapter:
        return load(place, family.parts_beside_text(folder))

    if texts is None:
        adapter = load(device, (*family.TEXT, "vae"))
        return adapter, adapter.encode
    folder_of_embeddings = cache_folder(recipe, folder, family.TEXT, read_geometry(folder, model).prompt_tokens)
    if folder_of_embeddings is None:
        adapter = load(device)
        warn_of_cut_prompts(adapter, texts)
        return adapter, LoadedEncoder(adapter)
    stored = StoredEncoder(
        folder_of_embeddings, load_encoders, device, MOST_UNASKED if recipe.data.embedding_cache == "auto" else None
    )
    encoder: Encoder = stored
    try:
        stored.prepare([*texts, family.uncond_text] if texts else ())
    except TooManyPromptsError:
        encoder = OffloadedEncoder(load_encoders, device)
    return load(device, family.TEXT), encoder
