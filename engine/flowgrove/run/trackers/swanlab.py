"""SwanLab."""

import os
import secrets
from pathlib import Path
from typing import Any

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, tiles

_STATES: dict[str, dict[str, Any]] = {
    "finished": {"state": "success"},
    "stopped": {"state": "aborted"},
    "failed": {"state": "crashed", "error": "the run has failed"},
}


class SwanLab:
    """A run of SwanLab, whose files lie in the run's folder `swanlab`."""

    def open(self, opening: Opening) -> Opened:
        import swanlab

        name = opening.id or secrets.token_hex(10)
        folder = Path(opening.folder) / "swanlab"
        folder.mkdir(exist_ok=True)
        self._run = swanlab.init(
            project=opening.project or os.environ.get("SWANLAB_PROJ_NAME") or "flowgrove",
            workspace=opening.entity,
            group=opening.group,
            name=opening.name,
            tags=opening.tags or None,
            id=name,
            resume="allow",
            log_dir=str(folder),
            mode=opening.mode,
            config=opening.recipe,
            settings=swanlab.Settings(interactive=False, terminal=swanlab.Settings.Terminal(proxy_type="none")),
        )
        return Opened(name, self._run.url if self._run.mode == "online" else None)

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        import swanlab

        shown = [swanlab.Image(tile, caption=caption) for tile, caption in tiles(pictures)]
        self._run.log({"samples": shown}, step=completed)

    def close(self, status: Status) -> None:
        self._run.finish(**_STATES[status])
