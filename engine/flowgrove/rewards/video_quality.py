"""The quality of whole videos, judged by a model behind a server, such as VideoAlign (2501.13918): the server of `http`
with `video: true`, under a name of its own, so that a recipe can have both.
"""

from typing import ClassVar

from flowgrove.recipe.schema import Count
from flowgrove.rewards.endpoint import Concurrency, Megabytes, Retries, Seconds
from flowgrove.rewards.http import HttpReward


class VideoQualityReward(HttpReward):
    """Options as `http` has them. A judge may take its time over a video."""

    name: ClassVar = "video_quality"

    def __init__(
        self,
        url: str,
        batch_size: Count = 1,
        timeout: Seconds = 300.0,
        retries: Retries = 3,
        concurrency: Concurrency = 4,
        max_answer_mb: Megabytes = 4.0,
        key_variable: str | None = None,
    ) -> None:
        super().__init__(url, True, batch_size, timeout, retries, concurrency, max_answer_mb, key_variable)
