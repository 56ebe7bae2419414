"""All trackers of a run, as its recipe names them in run.log: each is told the same, and none is waited for."""

import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flowgrove.recipe.schema import Recipe
from flowgrove.run.trackers.feed import Feed
from flowgrove.run.trackers.interface import Opening, Pictures, Status, flat
from flowgrove.run.trackers.registry import TRACKERS
from flowgrove.run.trackers.remote import Remote
from flowgrove.run.trackers.tensorboard import TensorBoard

_log = logging.getLogger("flowgrove")
_LONGEST = {"finished": 60.0, "stopped": 15.0, "failed": 15.0}  # seconds for all of them to send what they have
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")  # who may read an address


class Trackers:
    """The trackers of one part of a run, from a start of the command to its end. `folder`: the run's;
    `first_iteration`: the first that they will be told of; `say`: what else the user should know, like an address.
    """

    def __init__(self, recipe: Recipe, folder: Path, first_iteration: int, say: Callable[[str], object]) -> None:
        opening = Opening(
            folder=str(folder.resolve()),
            name=recipe.run.tracking.name or folder.resolve().name,
            recipe=_public(recipe.model_dump(mode="json")),
            first_iteration=first_iteration,
            process=os.getpid(),
            **recipe.run.tracking.model_dump(exclude={"name"}),
        )
        self._feeds: list[Feed] = []
        for name in dict.fromkeys(recipe.run.log):
            if name not in TRACKERS:  # jsonl
                continue
            title, _ = TRACKERS[name]
            if name == "tensorboard":
                self._feeds.append(Feed(title, TensorBoard(), opening))
            else:
                remote = Remote(name, partial(_said, say, title), partial(_log.warning, "%s %s", title))
                self._feeds.append(Feed(title, remote, opening, remote.abandon))

    def numbers(self, line: dict[str, Any]) -> None:
        """The numbers of a metrics line; what is no number is left out."""
        found = {
            name: float(value)
            for name, value in flat(line).items()
            if isinstance(value, int | float) and name != "iteration"
        }
        for feed in self._feeds:
            feed.numbers(line["iteration"], found)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        """What the model draws after so many completed iterations."""
        for feed in self._feeds:
            feed.pictures(completed, pictures)

    def close(self, status: Status) -> None:
        """Waits for them to send what they have, within bounds."""
        until = time.monotonic() + _LONGEST[status]
        for feed in self._feeds:
            feed.end(status)
        for feed in self._feeds:
            feed.wait(until)


def _said(say: Callable[[str], object], title: str, text: str) -> None:
    say(f"{title}: {text}")


def _public(content: Any) -> Any:
    """A recipe without the names and passwords that addresses in it may hold."""
    if isinstance(content, dict):
        return {key: _public(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_public(value) for value in content]
    return _IN_ADDRESS.sub("", content) if isinstance(content, str) else content
