"""A tracker at a distance from the run: a queue that never waits, and a thread that tells the tracker what is in it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from flowgrove.errors import one_line
from flowgrove.run.trackers.interface import Opening, Pictures, Status, Tracker

_log = logging.getLogger("flowgrove")
_MOST_NUMBERS, _MOST_PICTURES = 1000, 8  # waiting: 8 grids take up to 50 MB of the host
_END = "end"
_PATIENCE = 5.0  # seconds of waiting before the user is told what for
_KILLED = 5.0  # seconds for what has been killed to be gone


class Feed:
    """What `name` is told of a run. Nothing it does is raised here: its first error is one warning and the last that
    it is told. What it has no time for is left out, which is told too.

    `abandon` ends a tracker that hangs, if anything can.
    """

    def __init__(
        self, name: str, tracker: Tracker, opening: Opening, abandon: Callable[[], object] = lambda: None
    ) -> None:
        self.name, self._tracker, self._abandon = name, tracker, abandon
        self._queue: deque[tuple[str, Callable[[], object]]] = deque()
        self._filled = threading.Condition()
        self._failed = False
        self._left_out: dict[str, int] = {}
        self._put("start", lambda: tracker.open(opening))
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._fail(why(error))

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        """The numbers of an iteration, when the tracker comes to it."""
        self._put("iterations", lambda: self._tracker.numbers(iteration, values), _MOST_NUMBERS)

    def pictures(self, completed: int, pictures: Pictures) -> None:
        """A grid, when the tracker comes to it."""
        self._put("grids", lambda: self._tracker.pictures(completed, pictures), _MOST_PICTURES)

    def end(self, status: Status) -> None:
        """The last that the tracker is told; `wait` afterwards."""
        self._put(_END, lambda: self._tracker.close(status))

    def wait(self, until: float) -> None:
        """Waits for the tracker to end, until `time.monotonic()` is `until` at most; then it is abandoned."""
        if self._thread.ident is None:
            return
        self._thread.join(min(_PATIENCE, max(0.0, until - time.monotonic())))
        if self._thread.is_alive() and (left := until - time.monotonic()) > 0:
            _log.warning("waiting for %s to send what it has, for %.0f s at most", self.name, left)
            self._thread.join(left)
        if self._thread.is_alive():
            self._fail("it has not come to an end and is left")
            self._abandon()
            self._thread.join(_KILLED)
        if self._left_out:
            missed = " and ".join(f"{count} {kind}" for kind, count in self._left_out.items())
            _log.warning("%s has missed %s; metrics.jsonl has all metrics", self.name, missed)

    def _put(self, kind: str, call: Callable[[], object], most: int | None = None) -> None:
        with self._filled:
            if self._failed:
                return
            if most is not None and sum(waiting == kind for waiting, _ in self._queue) >= most:
                if not self._left_out:
                    _log.warning("%s does not keep up with the run and is told less; metrics.jsonl has all", self.name)
                self._left_out[kind] = self._left_out.get(kind, 0) + 1
                return
            self._queue.append((kind, call))
            self._filled.notify()

    def _work(self) -> None:
        kind = ""
        while kind != _END and not self._failed:
            with self._filled:
                self._filled.wait_for(lambda: self._queue)
                kind, call = self._queue.popleft()
            try:
                call()
            except BaseException as error:  # a package may also try to end the process
                self._fail(why(error))

    def _fail(self, reason: str) -> None:
        with self._filled:
            told, self._failed = self._failed, True
            self._queue.clear()
        if not told:
            _log.warning("%s gets no more metrics: %s; metrics.jsonl does", self.name, reason)


def why(error: BaseException) -> str:
    """An error of any package as part of a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        text = one_line(str(error), 300)
    except Exception:  # a package's exception may not even have a text
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
