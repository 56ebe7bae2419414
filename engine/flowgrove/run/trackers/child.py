"""The process of one tracker: `python -m flowgrove.run.trackers.child PACKAGE`, which a run starts.

What fails is tried again, ever more rarely; the user is told once. What the tracker was told is kept in the run's
folder, so that a run that goes on is the same one there, and tells nothing twice.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flowgrove.run.trackers.feed import why
from flowgrove.run.trackers.interface import Opening, Status, Tracker
from flowgrove.run.trackers.registry import TRACKERS

_FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 3600.0  # seconds
_AFTER_THE_RUN = 120.0  # seconds that a process outlives a run that was killed

Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Received:
    """A grid that came from the other process (`Pictures`)."""

    prompts: list[str]
    scores: NDArray[np.float64]
    tiles: NDArray[np.uint8]
    sources: NDArray[np.uint8] | None


class Sparing:
    """A tracker that is spared after an error: it is told nothing for a minute, after another one for two, at most for
    an hour. What it misses is counted. `tell` takes ("say" or "warn", text).
    """

    def __init__(self, name: str, tracker: Tracker, tell: Tell, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._tracker, self._tell, self._clock = name, tracker, tell, clock
        self._opening: Opening | None = None
        self._is_open = False
        self._state: dict[str, Any] = {}
        self._pause, self._silent_until = 0.0, -1.0
        self._warned, self._missed = False, 0

    def open(self, opening: Opening) -> None:
        """Opens the tracker as the same run as before, if there was one in this folder."""
        self._file = Path(opening.folder) / "trackers" / f"{self._name}.json"
        self._state = _known(self._file)
        self._opening = replace(opening, id=self._state.get("id"))
        self._attempt(lambda tracker: None)

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        """The numbers of an iteration that the tracker has none of yet."""
        self._once("iterations", iteration, lambda tracker: tracker.numbers(iteration, values))

    def pictures(self, completed: int, pictures: Received) -> None:
        """A grid that the tracker has not yet."""
        self._once("grids", completed, lambda tracker: tracker.pictures(completed, pictures))

    def close(self, status: Status) -> None:
        """Ends it, if it was ever opened, without a pause."""
        self._silent_until = -1.0
        if self._is_open:
            self._attempt(lambda tracker: tracker.close(status))
        if self._missed:
            self._tell("warn", f"has missed {self._missed} iterations and grids; metrics.jsonl has all metrics")

    def _once(self, kind: str, number: int, work: Callable[[Tracker], object]) -> None:
        if number < self._state.get(kind, 0):
            return
        if self._attempt(work):
            self._keep(**{kind: number + 1})
        else:
            self._missed += 1

    def _attempt(self, work: Callable[[Tracker], object]) -> bool:
        if self._opening is None or self._clock() < self._silent_until:
            return False
        try:
            if not self._is_open:
                self._open(self._opening)
            work(self._tracker)
        except BaseException as error:  # SystemExit and KeyboardInterrupt are errors of the package too
            traceback.print_exc()
            if not self._warned:
                self._tell("warn", f"misses metrics for now: {why(error)}; metrics.jsonl has them all")
            self._warned = True
            self._pause = min(_LONGEST_PAUSE, 2 * self._pause or _FIRST_PAUSE)
            self._silent_until = self._clock() + self._pause
            return False
        self._pause = 0.0
        return True

    def _open(self, opening: Opening) -> None:
        opened = self._tracker.open(opening)
        self._is_open = True
        self._keep(id=opened.id)
        if opened.address:
            self._tell("say", opened.address)
        if opened.describe is not None:
            try:
                opened.describe()
            except BaseException as error:
                traceback.print_exc()
                self._tell("warn", f"does not have the recipe: {why(error)}; recipe.yaml does")

    def _keep(self, **state: Any) -> None:
        """On disk soon: without it nothing is lost but that something is told twice."""
        self._state |= state
        partial = self._file.with_suffix(".partial")
        with suppress(OSError):
            partial.write_text(json.dumps(self._state) + "\n", encoding="utf-8")
            partial.replace(self._file)


def _known(file: Path) -> dict[str, Any]:
    """What a tracker was told before; of a damaged file what is not."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kinds = {"id": str, "iterations": int, "grids": int}
    return {key: found[key] for key, kind in kinds.items() if isinstance(found, dict) and type(found.get(key)) is kind}


def calls(pipe: IO[bytes]) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """(call, content, bytes of pictures) until the pipe ends, which it may do anywhere."""
    for line in iter(pipe.readline, b""):
        try:
            told = json.loads(line)
        except ValueError:
            return
        payload = pipe.read(told["bytes"])
        if len(payload) < told["bytes"]:
            return
        yield told["call"], told["content"], payload


def serve(tracker: Sparing, pipe: IO[bytes]) -> None:
    """Tells the tracker what comes; a pipe that ends without a close is a run that was killed."""
    for call, content, payload in calls(pipe):
        match call:
            case "open":
                tracker.open(Opening(**content))
            case "numbers":
                tracker.numbers(**content)
            case "pictures":
                whole, count = np.frombuffer(payload, np.uint8).reshape(content["shape"]), content["sources"]
                scores, sources = np.array(content["scores"], np.float64), whole[:, :count] if count else None
                pictures = Received(content["prompts"], scores, whole[:, count:], sources)
                tracker.pictures(content["completed"], pictures)
            case "close":
                tracker.close(content["status"])
                return
    leave = threading.Timer(_AFTER_THE_RUN, os._exit, (1,))
    leave.daemon = True
    leave.start()
    tracker.close("failed")


def main(package: str) -> None:
    """Serves one run; ends the process at once then, whatever the package has left to be done at the end."""
    pipe, reports = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nobody is asked for a key
    os.dup2(2, 1)  # what the package prints
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a scheduler may send them to all processes of a job
        signal.signal(each, signal.SIG_IGN)

    def tell(teller: str, text: str) -> None:
        with suppress(OSError):
            reports.write(json.dumps({teller: text}) + "\n")
            reports.flush()

    _, name = TRACKERS[package]
    tracker = getattr(import_module(f"flowgrove.run.trackers.{package}"), name)()
    serve(Sparing(package, tracker, tell), pipe)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
