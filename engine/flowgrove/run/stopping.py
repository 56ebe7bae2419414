"""Signals that end a run: it is saved first; a second one ends it at once, of several processes only a second SIGINT.

A signal interrupts what may be thrown away: loading, drawing, scoring. While weights change or files are written it
waits for `check`.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from flowgrove.process import started

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_REQUEST = 0.2  # seconds: a terminal that closes, or a wrapper that passes signals on, sends one request twice


class Stopped(KeyboardInterrupt):
    """Raised where a run may end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stopping:
    """A context manager that listens for the signals; those that are ignored, as under nohup, stay ignored.

    `saved`: the checkpoint that whoever was interrupted has written.
    """

    def __init__(self, leave: Callable[[int], Any] = os._exit) -> None:
        self.request: int | None = None
        self.saved: Path | None = None
        self.holding = False
        self._leave = leave
        self._since: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                with suppress(ValueError):  # not in the main thread: whoever runs it there listens
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # where an error ends all ranks, the first tells it, and torchrun ends those that are left when one has gone
        telling = kind is not None and not issubclass(kind, Stopped) and started() > 1
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if telling and number == signal.SIGTERM else handler)
        self._before.clear()

    def told(self, number: int) -> None:
        """Another rank has heard a signal: one of this rank's own that follows is the same request."""
        if self.request is None:
            self.request, self._since = number, None

    def hold(self) -> None:
        """From now on a signal waits for `check`."""
        self.holding = True

    def let_go(self) -> None:
        """From now on a signal interrupts at once. Raises Stopped if one has waited."""
        self.holding = False
        self.check()

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.request is not None:
            raise Stopped(self.request)

    def _hear(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        # torchrun passes signals on that a cluster has sent to its ranks too, and Python hears the second one only
        # after the operation that it is in: nothing tells how soon after the first it came
        ends_at_once = started() == 1 or number == signal.SIGINT
        if self.request is not None:
            if not ends_at_once:
                return
            if self._since is None:
                self._since = now
            elif now - self._since > _ONE_REQUEST:
                self._leave(128 + number)
            return
        self.request, self._since = number, now if ends_at_once else None
        if not self.holding:
            raise Stopped(number)
        with suppress(OSError):  # printing is not safe in a handler, and the terminal may be gone
            told = f"{signal.Signals(number).name}: ends after this update and a checkpoint"
            again = "; once more ends at once" if started() == 1 else ""
            os.write(2, f"{told}{again}\n".encode())
