"""How many floating-point operations the passes of a recipe take, before anything is loaded: the model's own code on
tensors without storage, counted by PyTorch's flop counter.

A multiplication with its addition counts as two. Matrix products, convolutions and attention are counted, as torch's
counter has them: the backward of fused attention computes its scores again, which makes it 2.5 forwards. What is
element by element is not. PyTorch's attention for CPUs, which tensors without storage run, and products that add in
place have no formula in the counter; they get those of the kernels for GPUs and of products that do not.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPPreTrainedModel

from flowgrove.errors import UserError
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.families import family_of, read_geometry
from flowgrove.models.folders import part_names
from flowgrove.models.geometry import Geometry, longest_prompt
from flowgrove.models.parts import model_from_config
from flowgrove.models.runner import CACHED_ATTENTION
from flowgrove.plan.unloaded import UnloadedModel, materialise
from flowgrove.recipe.schema import Recipe


@dataclass(frozen=True)
class Flops:
    """FLOPs at one picture size. Of a row of the longest prompt through the transformer, without the second one that
    guidance may need: `forward`, `backward`, `recomputed` (what gradient checkpointing runs again in the backward),
    `extrapolated` (forward of a step whose attention is extrapolated, rollout.cache) and `reference` (forward of the
    reference model). `decode`: a picture or video; `encode`: a prompt's text, None where the folder has no
    configuration of the text encoders. `doubled`: rows of a state in passes with guidance, 1 or 2; `trained`: those
    that a backward runs through.
    """

    geometry: Geometry
    doubled: int
    trained: int
    forward: int
    backward: int
    recomputed: int
    extrapolated: int
    reference: int
    decode: int
    encode: int | None

    @property
    def train(self) -> int:
        """A row's training pass as the model needs it: forward and backward."""
        return self.forward + self.backward


def count_flops(recipe: Recipe, model: UnloadedModel | None = None) -> list[Flops]:
    """The FLOPs of a recipe's passes at each of its sizes. `model`: the recipe's, where it is there already.

    Raises UserError without configuration files, and where the model does not run as they describe it.
    """
    whole = model or UnloadedModel(recipe)
    encode = _encoding(whole)
    found: dict[Geometry, Flops] = {}
    for sized in recipe.at_sizes():
        geometry = read_geometry(whole.folder, sized.model)
        if geometry not in found:
            found[geometry] = _at_size(whole.sized(geometry), encode)
    return [found[read_geometry(whole.folder, sized.model)] for sized in recipe.at_sizes()]


def counted(run: Callable[[], object]) -> FlopCounterMode:
    """The counter after `run`, with all that its own formulas lack."""
    with FlopCounterMode(display=False, custom_mapping=_FURTHER) as counter:
        run()
    return counter


def _at_size(model: UnloadedModel, encode: int | None) -> Flops:
    kind = model.recipe.model.gradient_checkpointing
    with model.running():
        with torch.no_grad():
            forward = counted(lambda: model.velocity_of_rows(1))
            reference = _reference(model, forward.get_total_flops())
        executed = _training(model)
        checkpoint_blocks(model.transformer, "none")
        try:
            trained = _training(model)
        finally:
            checkpoint_blocks(model.transformer, kind)
        latents = torch.empty(1, *model.geometry.latent_shape, dtype=model.master)
        decode = counted(lambda: model.adapter.decode(latents)).get_total_flops()
    return Flops(
        geometry=model.geometry,
        doubled=model.doubled,
        trained=model.together,
        forward=forward.get_total_flops(),
        backward=trained - forward.get_total_flops(),
        recomputed=executed - trained,
        extrapolated=forward.get_total_flops() - _of_attention(forward),
        reference=reference,
        decode=decode,
        encode=encode,
    )


def _training(model: UnloadedModel) -> int:
    """A training pass of one row. Gradients are not kept."""

    def train() -> None:
        v = model.velocity_of_rows(1)
        v.backward(torch.empty_like(v))

    try:
        return counted(train).get_total_flops()
    finally:
        model.transformer.zero_grad(set_to_none=True)
        for master in model.masters.values():
            master.grad = None


def _reference(model: UnloadedModel, forward: int) -> int:
    """A row's forward without LoRA layers, unless they start from some."""
    if model.recipe.model.lora is None or model.recipe.model.trains_initial_lora:
        return forward
    model.transformer.disable_adapters()
    try:
        return counted(lambda: model.velocity_of_rows(1)).get_total_flops()
    finally:
        model.transformer.enable_adapters()


def _of_attention(counter: FlopCounterMode) -> int:
    """What the layers take that rollout.cache extrapolates."""
    pattern = re.compile(rf"[^.]+\.(transformer(_2)?\.)?{CACHED_ATTENTION}")
    layers = {name: flops for name, flops in counter.get_flop_counts().items() if pattern.fullmatch(name)}
    return sum(sum(flops.values()) for flops in layers.values())


def _encoding(model: UnloadedModel) -> int | None:
    """A prompt of the longest length through every text encoder, without what a pipeline may put around it and
    without source pictures; None
    where an encoder has no configuration there, or does not run as that describes it.
    """
    family, folder = family_of(model.recipe.model.adapter), model.folder
    pairs = [(tokenizer, encoder) for tokenizer, encoder in family.text_parts() if encoder in part_names(folder)]
    if not pairs or not all((folder / encoder / "config.json").is_file() for _, encoder in pairs):
        return None
    try:
        with torch.device("meta"):
            encoders = [(tokenizer, model_from_config(folder, encoder)) for tokenizer, encoder in pairs]
        with model.running():
            return sum(_encoder(model, tokenizer, encoder) for tokenizer, encoder in encoders)
    except UserError:
        return None


@torch.no_grad()
def _encoder(model: UnloadedModel, tokenizer: str, encoder: Any) -> int:
    """One text encoder on the tokens of a prompt, to which texts of CLIP are padded."""
    materialise(encoder.requires_grad_(False).eval(), model.compute, model.master)
    tokens = model.geometry.prompt_tokens
    if isinstance(encoder, CLIPPreTrainedModel):
        positions = int(encoder.config.max_position_embeddings)
        tokens = min(positions, longest_prompt(model.folder, tokenizer, positions))
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return int(counted(lambda: encoder(ids, attention_mask=torch.ones_like(ids))).get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _adding_product(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of shapes [M, K] and [K, N], which are added to [M, N] in place."""
    return 2 * int(left[0]) * int(left[1]) * int(right[1])


_FURTHER = {
    torch.ops.aten.addmm_: _adding_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
