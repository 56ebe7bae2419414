"""Scores from a server of your own: JSON and PNG over HTTP.

Asked in batches, POST {"prompts": [...], "images": [base64 PNG, ...]}, or with `video: true` {"prompts": [...],
"videos": [[base64 PNG per frame], ...]}; the server answers {"scores": [one finite number each]}. Whatever else it does
is an error of one line, for which its prompts are left out: a reward that failed is never a 0.

What a prompt's row holds is sent on request: "metadata": [{column: value, ...}, ...] and "sources": [[base64 PNG, ...],
...], and where one of them has a source video "source_videos": [[base64 PNG per frame] or null, ...]. With `group:
true` a request holds all samples of one prompt and none of another, so that they can be compared.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowgrove.data.prompt import video_of
from flowgrove.models.sources import source_pictures, source_video
from flowgrove.recipe.schema import Count
from flowgrove.rewards.endpoint import Concurrency, Connections, Endpoint, Megabytes, Retries, Seconds
from flowgrove.rewards.faults import groups_of
from flowgrove.rewards.pictures import file_base64, png_base64
from flowgrove.rewards.pixels import to_bytes
from flowgrove.rewards.rows import metadata_rows


class HttpReward:
    """`timeout`: seconds for one try; `retries`: further ones; `concurrency`: requests at once; `key_variable`: the
    environment variable of a bearer token; `metadata`, `sources`, `group`: what is sent, and together.
    """

    name: ClassVar[str] = "http"
    remote: ClassVar = True

    def __init__(
        self,
        url: str,
        video: bool = False,
        batch_size: Count = 8,
        timeout: Seconds = 60.0,
        retries: Retries = 3,
        concurrency: Concurrency = 4,
        max_answer_mb: Megabytes = 4.0,
        key_variable: str | None = None,
        metadata: bool = False,
        sources: bool = False,
        group: bool = False,
    ) -> None:
        self.endpoint = Endpoint(self.name, url, timeout, retries, max_answer_mb, concurrency, key_variable)
        self.takes_video, self.batch_size = video, batch_size
        self.metadata, self.sources, self.groupwise = metadata, sources, group

    def __call__(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """`pictures` [B, 3, H, W], or with `video` [B, F, 3, H, W], in [0, 1] → scores float64 [B] on the CPU."""
        starts = range(0, len(prompts), self.batch_size)
        together = groups_of(prompts) if self.groupwise else [slice(start, start + self.batch_size) for start in starts]
        whole = to_bytes(pictures)
        batches = [(whole[some], prompts[some]) for some in together]
        return torch.tensor(
            [score for scores in self.endpoint.map(self._ask, batches) for score in scores], dtype=torch.float64
        )

    def _ask(self, client: Connections, batch: tuple[Tensor, list[str]]) -> list[float]:
        pictures, prompts = batch
        content: dict[str, Any] = {"prompts": prompts}
        if self.takes_video:
            content["videos"] = [[png_base64(frame) for frame in video] for video in pictures]
        else:
            content["images"] = [png_base64(picture) for picture in pictures]
        if self.metadata:
            content["metadata"] = metadata_rows(prompts)
        if self.sources:
            content |= _sources(prompts, *pictures.shape[-3:-1])
        answer = self.endpoint.post(client, content)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(prompts) or not all(_is_score(score) for score in scores):
            raise self.endpoint.nonsense(answer, f'{{"scores": [{len(prompts)} finite numbers]}}')
        return [float(score) for score in scores]


def _sources(prompts: list[str], height: int, width: int) -> dict[str, Any]:
    """The source pictures and videos of prompts as files, scaled to a size, each once."""
    distinct = list(dict.fromkeys(prompts))
    files = {prompt: [file_base64(one) for one in source_pictures(prompt, height, width)] for prompt in distinct}
    found: dict[str, Any] = {"sources": [files[prompt] for prompt in prompts]}
    if any(video_of(prompt) for prompt in distinct):
        videos: dict[str, list[str] | None] = {}
        for prompt in distinct:
            frames = source_video(prompt, height, width)
            videos[prompt] = None if frames is None else [file_base64(frame) for frame in frames]
        found["source_videos"] = [videos[prompt] for prompt in prompts]
    return found


def _is_score(value: Any) -> bool:
    """JSON's numbers, without the NaN, Infinity and integers beyond float64 that Python's reader lets in."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
