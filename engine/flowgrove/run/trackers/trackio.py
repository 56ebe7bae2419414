"""Trackio."""

import os
import secrets

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status, rows


class Trackio:
    """A run of Trackio, in its own store on this machine, or where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says."""

    def open(self, opening: Opening) -> Opened:
        if opening.mode == "offline":
            for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                os.environ.pop(name, None)
        import trackio

        name = opening.id or f"{opening.name}-{secrets.token_hex(2)}"  # runs go on by their names
        self._run = trackio.init(
            project=opening.project or "flowgrove",
            name=name,
            group=opening.group,
            config={**opening.recipe, "tags": opening.tags},
            resume="allow" if opening.id else "never",
            embed=False,
        )
        return Opened(name)

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        import trackio

        shown = {f"samples/{row}": trackio.Image(*one) for row, one in enumerate(rows(pictures))}
        self._run.log(shown, step=completed)

    def close(self, status: Status) -> None:
        self._run.finish()
