"""GenEval (Ghosh et al. 2310.11513): whether a picture shows the objects that its prompt's row asks for, in their
number, colour and place, judged by a detector behind a server.

The server of `http`, which also gets `"metadata": [{"tag": ..., "include": [...], "exclude": [...]}, ...]`, the rows of
GenEval's evaluation_metadata.jsonl.
"""

from typing import ClassVar

from flowgrove.data.prompt import metadata_of
from flowgrove.errors import UserError, one_line
from flowgrove.recipe.schema import Count
from flowgrove.rewards.endpoint import Concurrency, Megabytes, Retries, Seconds
from flowgrove.rewards.http import HttpReward


class GenEvalReward(HttpReward):
    """Options as `http` has them."""

    name: ClassVar = "geneval"

    def __init__(
        self,
        url: str,
        batch_size: Count = 8,
        timeout: Seconds = 60.0,
        retries: Retries = 3,
        concurrency: Concurrency = 4,
        max_answer_mb: Megabytes = 4.0,
        key_variable: str | None = None,
    ) -> None:
        super().__init__(
            url, False, batch_size, timeout, retries, concurrency, max_answer_mb, key_variable, metadata=True
        )

    def check(self, prompts: list[str]) -> None:
        """Raises UserError for a prompt whose row names no objects."""
        for prompt in prompts:
            if not metadata_of(prompt).get("include"):
                what = f"the row of {one_line(prompt, 60)!r} has no include, the objects that are sought"
                fix = "write data.metadata: [tag, include, exclude], and give prompts with these columns (jsonl)"
                raise UserError(f"reward geneval: {what}: {fix}")
