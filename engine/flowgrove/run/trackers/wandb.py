"""Weights & Biases."""

import os
import secrets
from typing import Any

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, tiles

_EXIT_CODES = {"finished": 0, "stopped": 255, "failed": 1}  # 255 is what it takes for an interruption


class WeightsAndBiases:
    """A run of W&B, whose files lie in the run's folder `wandb`.

    W&B leaves out what comes for a step before its last, and ends that step with each part of a run. Its steps are
    therefore completed iterations: the pictures of a model share one with the numbers of the iteration before, and
    none comes at a step whose numbers belong to an iteration that is still to run.
    """

    def open(self, opening: Opening) -> Opened:
        import wandb

        settings: dict[str, Any] = {"console": "off"}
        if "x_stats_pid" in getattr(wandb.Settings, "model_fields", {}):
            settings["x_stats_pid"] = opening.process  # whose memory and processor it shows
        name = opening.id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self._run = wandb.init(
            project=opening.project or os.environ.get("WANDB_PROJECT") or "flowgrove",
            entity=opening.entity,
            group=opening.group,
            name=opening.name,
            tags=opening.tags or None,
            id=name,
            resume="allow",
            dir=opening.folder,
            mode=opening.mode,
            config=opening.recipe,
            settings=wandb.Settings(**settings),
        )
        return Opened(name, self._run.url)

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=iteration + 1)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        import wandb

        shown = [wandb.Image(tile, caption=caption) for tile, caption in tiles(pictures)]
        self._run.log({"samples": shown}, step=completed)

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=_EXIT_CODES[status])
