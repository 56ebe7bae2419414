"""What a prompt's row says beside its text, as functions and servers get it: metadata, source pictures and
videos.
"""

from typing import Any

from PIL import Image

from flowgrove.data.prompt import json_metadata, pictures_of, video_of


def metadata_rows(prompts: list[str]) -> list[dict[str, Any]]:
    """The metadata of each prompt (data.metadata), as `json_metadata` has it."""
    rows = {prompt: json_metadata(prompt) for prompt in dict.fromkeys(prompts)}
    return [rows[prompt] for prompt in prompts]


def source_rows(prompts: list[str]) -> list[list[Image.Image]]:
    """The source pictures of each prompt in RGB, each read once. Raises UserError for one that cannot be read."""
    rows = {prompt: [picture.load() for picture in pictures_of(prompt)] for prompt in dict.fromkeys(prompts)}
    return [rows[prompt] for prompt in prompts]


def source_video_rows(prompts: list[str]) -> list[list[Image.Image] | None]:
    """The frames of each prompt's source video that the model reads, in RGB, each video read once; None where there is
    none. Raises UserError for one that cannot be read.
    """
    videos = {prompt: video_of(prompt) for prompt in prompts}
    rows = {prompt: None if video is None else video.load() for prompt, video in videos.items()}
    return [rows[prompt] for prompt in prompts]
