"""What a prompt's row says beside its text, as functions and servers get it: metadata, and source pictures."""

import json
from typing import Any

from PIL import Image

from flowgrove.data.prompt import metadata_of, pictures_of


def metadata_rows(prompts: list[str]) -> list[dict[str, Any]]:
    """The metadata of each prompt (data.metadata), as JSON has it; what JSON has not is its text."""
    rows: dict[str, dict[str, Any]] = {
        prompt: json.loads(json.dumps(dict(metadata_of(prompt)), default=str)) for prompt in dict.fromkeys(prompts)
    }
    return [rows[prompt] for prompt in prompts]


def source_rows(prompts: list[str]) -> list[list[Image.Image]]:
    """The source pictures of each prompt in RGB, each read once. Raises UserError for one that cannot be read."""
    rows = {prompt: [picture.load() for picture in pictures_of(prompt)] for prompt in dict.fromkeys(prompts)}
    return [rows[prompt] for prompt in prompts]
