"""How large a sample is: latents, picture tokens and text tokens of a recipe's model, and what its family reads from
the pipeline's configuration files to tell.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Model


@dataclass(frozen=True)
class Geometry:
    """One sample: `latent_shape` as states hold it (without the batch), pixels,
    and what a row costs the transformer in tokens.
    """

    latent_shape: tuple[int, ...]
    height: int
    width: int
    unit: int  # pixels per token and side
    frames: int | None  # None: a picture
    picture_tokens: int
    prompt_tokens: int  # the longest prompt that is read; of several encoders, by the last
    text_tokens: int  # of the longest prompt, that stand beside the picture's in the transformer
    source_tokens: int = 0  # of the prompt's source pictures or quoted texts, that stand there too
    source_read: int = 0  # tokens of source pictures that the transformer reads through cross-attention
    fps: int = 16  # of videos, as files
    source_pictures: int = 0  # of a prompt, where more than the tokens depends on their number

    @property
    def pixels(self) -> int:
        """Pixels of a sample, all frames together."""
        return self.height * self.width * (self.frames or 1)

    @property
    def tokens(self) -> int:
        return self.picture_tokens + self.source_tokens + self.text_tokens


def packed_geometry(model: Model, scale: int, channels: int, text_tokens: int, sources: int = 0) -> Geometry:
    """That of pipelines that hand the transformer a list of 2×2 patches: states are [tokens, channels]. `sources`: the
    pictures of the same size that stand beside each.
    """
    unit = 2 * scale
    height, width = drawn_size(model, 128 * scale, unit)
    tokens, text = (height // unit) * (width // unit), model.text_tokens or text_tokens
    return Geometry((tokens, channels), height, width, unit, None, tokens, text, text, sources * tokens)


def drawn_size(model: Model, default: int, unit: int, most: int | None = None) -> tuple[int, int]:
    """(model.height, model.width) in pixels, `default` where not given. Raises UserError for a side that is no multiple
    of `unit`, or longer than `most`.
    """
    height, width = (
        multiple_of(name, size or default, unit, most)
        for name, size in (("height", model.height), ("width", model.width))
    )
    return height, width


def multiple_of(name: str, size: int, unit: int, most: int | None = None) -> int:
    """`size` of model.`name`. Raises UserError unless it is a multiple of `unit`, up to `most`."""
    if size % unit or (most is not None and size > most):
        raise UserError(f"model.{name} is {size}: write a multiple of {unit}" + (f" up to {most}" if most else ""))
    return size


def video_frames(model: Model, default: int, unit: int) -> int:
    """model.frames, `default` where not given. Raises UserError unless it is a multiple of `unit` and one more."""
    frames = model.frames or default
    if frames % unit != 1 % unit:
        near = frames // unit * unit + 1
        raise UserError(f"model.frames is {frames}: write a multiple of {unit} and one more, like {near}")
    return frames


def autoencoder_scale(folder: Path) -> int:
    """Pixels per latent and side of an AutoencoderKL."""
    return 2 ** (len(part_config(folder, "vae")["block_out_channels"]) - 1)


def longest_prompt(folder: Path, tokenizer: str, default: int) -> int:
    """Tokens that a tokenizer reads; `default` for a folder that says nothing of it."""
    file = folder / tokenizer / "tokenizer_config.json"
    return (
        int(json.loads(file.read_text(encoding="utf-8")).get("model_max_length", default))
        if file.is_file()
        else default
    )


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of the pipeline."""
    content: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return content
