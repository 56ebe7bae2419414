"""The source pictures of prompts: as many as the model takes, each as large as what is drawn."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from flowgrove.data.prompt import Picture, pictures_of
from flowgrove.errors import UserError, one_line
from flowgrove.models.families import family_of
from flowgrove.recipe.schema import Model

SOURCE_LATENTS = "source_latents"  # of a Conditioning: what the VAE makes of the pictures


def source_pictures(prompt: str, height: int, width: int) -> list[Image.Image]:
    """The source pictures of a prompt in RGB, each scaled to cover height × width and cropped at its middle. Raises
    UserError for one that cannot be read.
    """
    return [fitted(picture.load(), height, width) for picture in pictures_of(prompt)]


def fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture scaled to cover height × width and cropped at its middle; as it is, if it has this size."""
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def check_sources(model: Model, prompts: Iterable[str]) -> None:
    """Raises UserError unless every prompt has as many source pictures as the model takes, and all can be read."""
    family = family_of(model.adapter)
    count, (fewest, most) = family.source_count(model), family.source_pictures
    if not count:
        return
    if model.sizes is not None:
        raise UserError("model.sizes: source pictures are encoded at one size: write model.height and model.width")
    pictures: dict[str, Picture] = {}
    for prompt in prompts:
        found = pictures_of(prompt)
        if len(found) != count:
            what = f"the prompt {one_line(prompt, 60)!r} has {len(found)} source pictures, and {model.adapter} takes"
            fix = "write their paths in a column image or images"
            fix += "" if fewest == most else ", or set model.source_pictures"
            raise UserError(f"{what} {count}: {fix}")
        pictures |= {picture.identity: picture for picture in found}
    with ThreadPoolExecutor() as threads:  # decoders let go of the interpreter
        for _ in threads.map(_check, pictures.values()):
            pass


def _check(picture: Picture) -> None:
    picture.load()
