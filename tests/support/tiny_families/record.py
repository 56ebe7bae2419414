"""What tests know of a family beside its adapter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowgrove.models.families import family_of
from flowgrove.models.sources import source_pictures
from pictured import pictured, write_prompts


@dataclass(frozen=True)
class TinyFamily:
    """A tiny pipeline, and how diffusers' own pipeline is called to draw what a rollout draws.

    `call(guidance, prompts, model)` gives the pipeline's options beside those that all have (height, width,
    num_inference_steps, latents, max_sequence_length): `prompts` is their number, `model` the recipe's section.
    """

    name: str
    pipeline: Any  # the class of diffusers
    model: dict[str, Any]  # what a recipe says of it
    build: Callable[[], Any]  # the pipeline, in memory
    call: Callable[[float, int, Any], dict[str, Any]]
    guidance: float  # that of training tests
    blocks: int  # of the transformer, compiled one by one
    # options of the prompts' source pictures, and of all that the prompts themselves have
    pictured: Callable[[list[list[Image.Image]], Any], dict[str, Any]] = field(default=lambda pictures, model: {})
    filmed: Callable[[list[str], Any], dict[str, Any]] = field(default=lambda prompts, model: {})
    output: str = "images"  # where the pipeline's result holds what it drew
    as_theirs: Callable[[Any, Any, Tensor], Tensor] = field(default=lambda pipe, model, x: x)  # states as `latents`
    as_ours: Callable[[Any, Any, Tensor], Tensor] = field(default=lambda pipe, model, x: x)  # drawn latents as states
    as_leaves: Callable[[Any, Tensor], Tensor] = field(default=lambda cond, x: x)  # states that a rollout can end in
    flow_shift: float | None = None  # where the pipeline's own solver is not Euler's: the shift of the Euler table
    silent: str = "(?!)"  # weights that full training gives no gradient, as a regular expression
    one_by_one: bool = False  # whether the pipeline takes one prompt at a time
    swept: bool = False  # whether `make test` runs all its cases, not a sample
    variant: bool = False  # `make test` runs a rollout of it alone: one like another, or one that takes long
    sides: int = 1  # where the pipeline takes no sides as short as tests draw: so many times as long
    cuts_tokens: bool = True  # whether encoders read text_tokens tokens of a longer prompt, no more

    def load_lora(self, pipe, folder):
        """Loads a LoRA as diffusers does: into the pipeline, or where that cannot, into its transformer."""
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(folder)
        else:
            pipe.transformer.load_lora_adapter(folder, use_safetensors=True)

    @property
    def sources(self):
        """The source pictures of a prompt."""
        return self.model.get("source_pictures", family_of(self.model["adapter"]).source_pictures[0])

    @property
    def source_frames(self):
        """The frames of a prompt's source video; 0: it has none."""
        return self.model["frames"] if family_of(self.model["adapter"]).source_video else 0

    def prompts(self, texts):
        """The texts, with as many source pictures as the family takes, and a video, each of its own."""
        return pictured(texts, self.sources, self.source_frames)

    def write_prompts(self, path, texts):
        """Writes a prompt file, with as many pictures per row as the family takes, and a video; returns its path."""
        return write_prompts(path, texts, self.sources, self.source_frames)

    def options(self, guidance, prompts, model):
        """All options of a call but the prompts, their latents, the number of steps and the output's kind."""
        sizes = {"height": model.height, "width": model.width, "max_sequence_length": model.text_tokens}
        pictures = [source_pictures(prompt, model.height, model.width) for prompt in prompts]
        told = sizes | self.call(guidance, len(prompts), model) | self.filmed(prompts, model)
        return told | (self.pictured(pictures, model) if self.sources else {})

    def draw(self, pipe, model, guidance, prompts, latents, **options):
        """What diffusers' pipeline draws of these states, one for each of the prompts."""

        def call(some, x):
            told = self.options(guidance, some, model) | options
            result = pipe(prompt=[str(prompt) for prompt in some], latents=self.as_theirs(pipe, model, x), **told)
            return getattr(result, self.output)

        if not self.one_by_one:
            return call(prompts, latents)
        return torch.cat([call([prompt], latents[row : row + 1]) for row, prompt in enumerate(prompts)])
