"""From a recipe to its model on the device: which family,
and its text encoders before the rest and only as long as they are needed.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch

from flowgrove.data.prompt import conditional, unconditional
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
from flowgrove.models.experts import FOLDERS, as_one, trained_experts, transformer_folders
from flowgrove.models.families import family_of, read_geometry
from flowgrove.models.folders import model_folder, part_names
from flowgrove.models.geometry import part_config
from flowgrove.models.parts import check_statistics, check_tokenizer, is_of_a_library, is_quantised, load_part
from flowgrove.models.sources import check_sources
from flowgrove.models.stored import all_bf16
from flowgrove.process import is_first, rank_here, share_of, started_here
from flowgrove.ranks import Ranks
from flowgrove.recipe.schema import Model, Recipe


def load_model(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, texts: Iterable[str] | None, on_host: bool = False
) -> tuple[Adapter, Encoder]:
    """The adapter and what encodes its prompts; `texts` are those that will be asked for, None: none, and nothing will
    be decoded. `on_host`: the transformer stays in host memory, as its files hold it. Raises UserError.
    """
    family = family_of(recipe.model.adapter)
    if texts is None:
        adapter = _load(recipe.model, device, dtype, (*family.TEXT, "vae"))
        return adapter, adapter.encode
    stored = _stored_encoder(recipe, device, dtype)
    if stored is None:
        adapter = _load(recipe.model, device, dtype, on_host=on_host)
        if is_first():
            warn_of_cut_prompts(adapter, texts)
        return adapter, LoadedEncoder(adapter)
    encoder: Encoder = stored
    try:
        stored.prepare(_encoded(recipe, texts))
    except TooManyPromptsError:
        encoder = OffloadedEncoder(stored.load, device)
    return _load(recipe.model, device, dtype, family.TEXT, on_host), encoder


def is_rounded_alone(recipe: Recipe, dtype: torch.dtype) -> bool:
    """Whether what the recipe trains is rounded on its way to the device where nothing will train it. What lies
    quantised in its folder is left to whoever reads it.
    """
    if recipe.model.lora is not None or dtype != torch.bfloat16:
        return False
    folder = model_folder(recipe.model)
    return not any(is_quantised(folder / name) for name in transformer_folders(folder))


def check_prompts(recipe: Recipe, texts: Sequence[str]) -> None:
    """Raises UserError for source pictures and videos that do not suit the model or cannot be read. Those of prompts
    whose embeddings are stored were read then.
    """
    if not family_of(recipe.model.adapter).sources_of(recipe.model):
        check_sources(recipe.model, texts)
        return
    check_sources(recipe.model, texts, ())  # how many they are, before any is read
    stored = _stored_encoder(recipe, torch.device("cpu"), torch.float32)
    wanted = [conditional(text) for text in texts]
    check_sources(recipe.model, texts, wanted if stored is None else stored.missing(wanted))


def encode_together(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, texts: Sequence[str], ranks: Ranks
) -> None:
    """Before several `ranks` load a recipe's model with `texts`: each encodes its share of those whose embeddings are
    not stored yet, where they are to be.

    What a rank does not find after that, since machines have folders of their own, the ranks of its machine divide
    once more; `load_model` encodes whatever is still missing then. Raises UserError.
    """
    if ranks.size == 1 or not texts:
        return
    stored = ranks.together(lambda: _stored_encoder(recipe, device, dtype))
    if stored is None:
        return
    wanted = _encoded(recipe, texts)
    for rank, size in ((ranks.rank, ranks.size), (rank_here(), started_here())):
        # all know what is missing before any of it is stored
        missing = ranks.together(lambda: stored.missing(wanted))
        if ranks.most(ranks.together(partial(_store_share, stored, missing, rank, size))):
            return


def _store_share(stored: StoredEncoder, missing: list[str], rank: int, size: int) -> bool:
    """Stores rank `rank`'s share of what is missing; whether all of it is more than may be stored unasked."""
    mine = missing[share_of(len(missing), rank, size)]
    try:
        stored.store(mine, missing, warn=rank == size - 1)  # the last rank has some where any has
    except TooManyPromptsError:
        return True
    return False


def _encoded(recipe: Recipe, texts: Iterable[str]) -> list[str]:
    """What is encoded of prompts, and what guidance leads away from: once for each source if it is used."""
    model, wanted, family = recipe.model, list(texts), family_of(recipe.model.adapter)
    if not wanted:
        return []
    found, default = [conditional(text) for text in wanted], family.default_negative(model)
    key = family.guidance_key
    guided = recipe.largest_guidance > 1 and not (key and part_config(model_folder(model), "transformer").get(key))
    if guided or not family.sources_of(model):
        found += [unconditional(text, default) for text in wanted]
    return list(dict.fromkeys(found))


def _stored_encoder(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> StoredEncoder | None:
    """Where a recipe's embeddings are stored; None where its encoders stay loaded."""
    model, folder, family = recipe.model, model_folder(recipe.model), family_of(recipe.model.adapter)
    sources, prompt_tokens = family.sources_of(model), read_geometry(folder, model).prompt_tokens
    parts = (*family.TEXT, "vae") if sources else family.TEXT
    place = cache_folder(recipe, folder, parts, prompt_tokens, sources)
    if place is None:
        return None

    def load_encoders(device: torch.device) -> Adapter:
        return _load(model, device, dtype, family.parts_beside_text(folder))

    return StoredEncoder(place, load_encoders, device, MOST_UNASKED if recipe.data.embedding_cache == "auto" else None)


def _load(
    model: Model, device: torch.device, dtype: torch.dtype, without: tuple[str, ...] = (), on_host: bool = False
) -> Adapter:
    """What `load_adapter` gives; whatever a library raises over the folder is a UserError."""
    diffusers.utils.logging.disable_progress_bar()
    try:
        return load_adapter(family_of(model.adapter), model_folder(model), model, device, dtype, without, on_host)
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        raise UserError(
            f"model.path {model.path} does not load as a {model.adapter} pipeline: {' '.join(str(error).split())[:300]}"
        ) from None


def load_adapter(
    family: type[Adapter], folder: Path, model: Model, device: torch.device, weights: torch.dtype,
    without: tuple[str, ...] = (), on_host: bool = False,
) -> Adapter:  # fmt: skip
    """The pipeline in `folder`, frozen, on `device`.

    `without` names parts that are left on disk: `TEXT` for an adapter that need not encode, `parts_beside_text` for
    one that does nothing else. `on_host`: the transformer stays in host memory, where it takes none of its own as long
    as it is in the dtype of its files, for whoever divides or rounds it.
    """
    without = tuple(name for name in without if name not in family.ALWAYS)
    if not set(family.TEXT) <= set(without):
        _check_packages(family, model)
    geometry = read_geometry(folder, model)
    dtypes = _dtypes(family, folder, model, weights, on_host)
    named, transformers = part_names(folder), transformer_folders(folder)
    _check_parts(family, folder, named)
    parts: dict[str, Any] = dict.fromkeys(family.TEXT)
    parts |= {name: None if name in without else load_part(folder, name, dtypes.get(name, weights)) for name in named}
    for tokenizer, encoder in family.text_parts():
        if parts.get(encoder) is not None:
            check_tokenizer(folder / tokenizer, parts[tokenizer], parts[encoder])
    if parts.get("vae") is not None:
        check_statistics(folder / "vae", parts["vae"], family.LATENTS)
    pipe = family.pipeline_class(folder).from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    if on_host:
        for name, part in pipe.components.items():
            if isinstance(part, torch.nn.Module) and name not in transformers:
                part.to(device)
    else:
        pipe.to(device)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    if "vae" not in without and model.vae_tiling:
        pipe.vae.enable_tiling()
    return family(geometry, as_one({name: getattr(pipe, name) for name in transformers}, model), pipe, folder)


def _dtypes(
    family: type[Adapter], folder: Path, model: Model, weights: torch.dtype, on_host: bool
) -> dict[str, torch.dtype]:
    """The parts that are not read in the dtype `weights`. Raises UserError for a quantised transformer that is to be
    divided or rounded.
    """
    dtypes: dict[str, torch.dtype] = {}
    transformers = transformer_folders(folder)
    trained = transformers if len(transformers) == 1 else [FOLDERS[expert] for expert in trained_experts(model)]
    if weights != torch.float64:
        if model.lora is None:  # all of it trains: masters as precise as the files
            dtypes |= dict.fromkeys(trained, torch.float32)
        if family.vae_dtype is not None:
            dtypes["vae"] = family.vae_dtype
    if on_host:
        if quantised := [folder / name for name in transformers if is_quantised(folder / name)]:
            why = "engine.distributed: fsdp2 divides plain weights: write ddp"
            if model.base_precision is not None:
                why = "model.base_precision rounds plain weights: write null"
            raise UserError(f"{quantised[0]} is stored quantised, and {why}, or give the model's unquantised folder")
        if model.lora is None:
            dtypes |= {name: torch.bfloat16 for name in trained if all_bf16(folder / name)}
    return dtypes


def _check_packages(family: type[Adapter], model: Model) -> None:
    """Raises UserError for a package that is not installed, without which the family encodes nothing."""
    if missing := [name for name in family.packages if find_spec(name) is None]:
        what = f"model.adapter {model.adapter} reads pictures with {missing[0]}, which is not installed"
        raise UserError(f"{what}: pip install {missing[0]}")


def _check_parts(family: type[Adapter], folder: Path, named: list[str]) -> None:
    """Raises UserError if a part is left out of model_index.json that the family does not run without."""
    optional = [pair for pair in family.text_parts() if pair[1] in family.OPTIONAL and pair[1] not in named]
    needed = {"scheduler", *family.PICTURE, *family.TEXT} - {name for pair in optional for name in pair}
    needed -= {name for name in family.OPTIONAL if name not in named}
    if family.boundary(folder) is not None:
        needed.add(FOLDERS["low"])
    if missing := sorted(needed - set(named)):
        raise UserError(f"{folder / 'model_index.json'} names no {missing[0]}: download the whole pipeline folder")
