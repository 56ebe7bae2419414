"""How large a sample is: latents, picture tokens and text tokens of a recipe's model,
from the pipeline's configuration files alone.
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

    @property
    def pixels(self) -> int:
        """Pixels of a sample, all frames together."""
        return self.height * self.width * (self.frames or 1)

    @property
    def tokens(self) -> int:
        return self.picture_tokens + self.text_tokens


def read_geometry(folder: Path, model: Model) -> Geometry:
    """Raises UserError for a size that the model cannot draw,
    or a folder whose configuration is not that of a `model.adapter` pipeline.
    """
    pipeline, family = _FAMILIES[model.adapter]
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if index["_class_name"] != pipeline:
            fitting = [name for name, (of, _) in _FAMILIES.items() if of == index["_class_name"]]
            hint = f"write model.adapter: {fitting[0]}" if fitting else f"the adapters are {', '.join(_FAMILIES)}"
            raise UserError(
                f"model.path {model.path} holds a {index['_class_name']}, "
                f"which is not for model.adapter {model.adapter}: {hint}"
            )
        if index.get("boundary_ratio") is not None or index.get("expand_timesteps"):
            raise UserError(
                f"model.path {model.path} is a Wan2.2 pipeline: the wan adapter trains Wan2.1, "
                "with one transformer and one time for all tokens"
            )
        found = family(folder, model)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"model.path {model.path}: cannot read {error.filename} ({error.strerror}): "
            "download the whole pipeline folder"
        ) from None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"model.path {model.path} is not laid out as a {model.adapter} pipeline: check model.adapter, "
            "or download the folder anew"
        ) from None
    if found.frames is None and model.frames is not None:
        raise UserError(f"model.frames is {model.frames}, but {model.adapter} draws pictures: leave it out")
    return found


def _sd3(folder: Path, model: Model) -> Geometry:
    transformer, scale = _config(folder, "transformer"), _autoencoder_scale(folder)
    unit = scale * transformer["patch_size"]
    height, width = _size(model, transformer["sample_size"] * scale, unit, transformer["pos_embed_max_size"] * unit)
    clip = _longest(folder, "tokenizer", 77)
    t5 = model.text_tokens or min(256, _longest(folder, "tokenizer_3", 256))
    return Geometry(
        (transformer["in_channels"], height // scale, width // scale),
        height,
        width,
        unit,
        None,
        (height // unit) * (width // unit),
        t5,
        clip + t5,
    )


def _flux(folder: Path, model: Model) -> Geometry:
    return _packed(model, _autoencoder_scale(folder), _config(folder, "transformer")["in_channels"], 512)


def _qwen_image(folder: Path, model: Model) -> Geometry:
    return _packed(
        model,
        2 ** len(_config(folder, "vae")["temperal_downsample"]),
        _config(folder, "transformer")["in_channels"],
        512,
    )


def _packed(model: Model, scale: int, channels: int, text_tokens: int) -> Geometry:
    """Pipelines that hand the transformer a list of 2×2 patches: states are [tokens, channels]."""
    unit = 2 * scale
    height, width = _size(model, 128 * scale, unit)
    tokens, text = (height // unit) * (width // unit), model.text_tokens or text_tokens
    return Geometry((tokens, channels), height, width, unit, None, tokens, text, text)


def _wan(folder: Path, model: Model) -> Geometry:
    transformer, vae = _config(folder, "transformer"), _config(folder, "vae")
    space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
    _, patch_height, patch_width = transformer["patch_size"]
    frames = model.frames or 81
    if frames % time != 1 % time:
        near = frames // time * time + 1
        raise UserError(f"model.frames is {frames}: write a multiple of {time} and one more, like {near}")
    height, width = (
        _multiple(name, size or default, space * patch)
        for name, size, default, patch in (
            ("height", model.height, 480, patch_height),
            ("width", model.width, 832, patch_width),
        )
    )
    shape = (transformer["in_channels"], (frames - 1) // time + 1, height // space, width // space)
    tokens = shape[1] * (shape[2] // patch_height) * (shape[3] // patch_width)
    # text is read through cross-attention
    return Geometry(shape, height, width, space * patch_height, frames, tokens, model.text_tokens or 512, 0)


_FAMILIES = {
    "sd3": ("StableDiffusion3Pipeline", _sd3),
    "flux": ("FluxPipeline", _flux),
    "qwen_image": ("QwenImagePipeline", _qwen_image),
    "wan": ("WanPipeline", _wan),
}


def _size(model: Model, default: int, unit: int, most: int | None = None) -> tuple[int, int]:
    height, width = (
        _multiple(name, size or default, unit, most)
        for name, size in (("height", model.height), ("width", model.width))
    )
    return height, width


def _multiple(name: str, size: int, unit: int, most: int | None = None) -> int:
    if size % unit or (most is not None and size > most):
        raise UserError(f"model.{name} is {size}: write a multiple of {unit}" + (f" up to {most}" if most else ""))
    return size


def _autoencoder_scale(folder: Path) -> int:
    return 2 ** (len(_config(folder, "vae")["block_out_channels"]) - 1)


def _longest(folder: Path, tokenizer: str, default: int) -> int:
    file = folder / tokenizer / "tokenizer_config.json"
    return (
        int(json.loads(file.read_text(encoding="utf-8")).get("model_max_length", default))
        if file.is_file()
        else default
    )


def _config(folder: Path, part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return content
