"""Weights & Biases."""

import os
import secrets
from typing import Any

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, tiles

_EXIT_CODES = {"finished": 0, "stopped": 255, "failed": 1}  # 255 is what it takes for an interruption


class WeightsAndBiases:
    """A run of W&B, whose files lie in the run's folder `wandb`."""

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
        self._waiting: dict[int, Pictures] = {}
        return Opened(name, self._run.url)

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        found = dict[str, Any](values)
        for completed in [one for one in self._waiting if one <= iteration]:
            found |= self._shown(self._waiting.pop(completed))
        self._run.log(found, step=iteration)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        """They go with the numbers of the iteration after them, as its steps only grow; those of the final model, which
        come before the numbers of the last iteration, when the run is closed.
        """
        self._waiting[completed] = pictures

    def close(self, status: Status) -> None:
        for completed, pictures in self._waiting.items():
            self._run.log(self._shown(pictures), step=completed)
        self._run.finish(exit_code=_EXIT_CODES[status])

    @staticmethod
    def _shown(pictures: Pictures) -> dict[str, Any]:
        import wandb

        return {"samples": [wandb.Image(tile, caption=caption) for tile, caption in tiles(pictures)]}
