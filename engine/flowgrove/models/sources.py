"""The source pictures and videos of prompts: as many as the model takes, each as large as what is drawn."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageOps

from flowgrove.data.prompt import mask_of, pictures_of, video_of
from flowgrove.data.sources import Picture, Video
from flowgrove.errors import UserError, one_line
from flowgrove.models.families import family_of
from flowgrove.recipe.schema import Model

SOURCE_LATENTS = "source_latents"  # of a Conditioning: what the VAE makes of pictures and videos


def source_pictures(prompt: str, height: int, width: int) -> list[Image.Image]:
    """The source pictures of a prompt in RGB, each scaled to cover height × width and cropped at its middle. Raises
    UserError for one that cannot be read.
    """
    return [fitted(picture.load(), height, width) for picture in pictures_of(prompt)]


def source_video(prompt: str, height: int, width: int) -> list[Image.Image] | None:
    """The frames of a prompt's source video that the model reads, each as `source_pictures` has pictures; None: it has
    no video. Raises UserError for one that cannot be read, or is too short.
    """
    return _fitted_frames(video_of(prompt), height, width)


def source_mask(prompt: str, height: int, width: int) -> list[Image.Image] | None:
    """The same of the mask of that video."""
    return _fitted_frames(mask_of(prompt), height, width)


def _fitted_frames(video: Video | None, height: int, width: int) -> list[Image.Image] | None:
    return None if video is None else [fitted(frame, height, width) for frame in video.each()]


def fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture scaled to cover height × width and cropped at its middle; as it is, if it has this size."""
    if picture.size == (width, height):
        return picture
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def check_sources(model: Model, prompts: Iterable[str], unread: Iterable[str] | None = None) -> None:
    """Raises UserError unless every prompt has as many source pictures as the model takes, or a video instead of none,
    and those of `unread` can be read; None: of all.
    """
    family = family_of(model.adapter)
    count, (fewest, most) = family.source_count(model), family.source_pictures
    if not (count or family.source_video):
        return
    if model.sizes is not None:
        raise UserError("model.sizes: source pictures are encoded at one size: write model.height and model.width")
    prompts = list(prompts)
    for prompt in prompts:
        found, video = pictures_of(prompt), video_of(prompt)
        if len(found) != count:
            what = f"the prompt {one_line(prompt, 60)!r} has {len(found)} source pictures, and {model.adapter} takes"
            fix = "write their paths in a column image or images"
            fix += "" if fewest == most else ", or set model.source_pictures"
            raise UserError(f"{what} {count}: {fix}")
        if not found and video is None:
            what = f"the prompt {one_line(prompt, 60)!r} has no source video, which {model.adapter} follows"
            raise UserError(f"{what}: write its path in a column video, or set model.source_pictures")
        if video is None and mask_of(prompt) is not None:
            what = f"the prompt {one_line(prompt, 60)!r} has a mask and no video that it is of"
            raise UserError(f"{what}: write the video's path in a column video")
    sources: dict[str, Picture | Video] = {}
    for prompt in prompts if unread is None else unread:
        every = (*pictures_of(prompt), video_of(prompt), mask_of(prompt))
        sources |= {source.identity: source for source in every if source is not None}
    with ThreadPoolExecutor() as threads:  # decoders let go of the interpreter
        for _ in threads.map(_check, sources.values()):
            pass


def _check(source: Picture | Video) -> None:
    if isinstance(source, Picture):
        source.load()
    else:
        for _ in source.each():
            pass
