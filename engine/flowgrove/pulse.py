"""Whether the other ranks of a run are alive: a thread that counts in the store that they all see, and watches theirs.

Slowness is not death: a rank that waits for a reward or loads a model goes on counting. One that was killed closes its
connections, which those that wait for it notice by themselves; one that was stopped or whose machine hangs does not.
"""

import logging
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

_log = logging.getLogger("flowgrove")
_BEAT = 1.0  # seconds from one count to the next
_SILENCE = 15.0  # seconds without a count before a rank is named
_FAREWELL = 10.0  # seconds that a rank has to end by itself once one of them has ended the run
NOTES, ENDED = "notes", "ended"  # where in the store ranks leave notes, and the note of one that has ended the run


class Pulse:
    """Context manager: inside, this rank counts under its number in `store`; the first says which of `size` do not,
    and the second whether the first does. `end` gets the note of a rank that has ended the run, when this one has not
    ended soon after it: it waits in a collective for one that has gone.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        end: Callable[[str], object],
        beat: float = _BEAT,
        silence: float = _SILENCE,
        farewell: float = _FAREWELL,
    ) -> None:
        self._store, self._notes = dist.PrefixStore("pulse", store), dist.PrefixStore(NOTES, store)
        self._end, self._farewell = end, farewell
        # one rank names another: the first, and of the first the second
        self._rank, self._others = rank, [other for other in range(size) if other != rank == (0 if other else 1)]
        self._beat, self._silence = beat, silence
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._count(0)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(2 * self._beat)

    def _run(self) -> None:
        heard = {other: (-1, time.monotonic()) for other in self._others}
        named: set[int] = set()
        number, ends = 0, None
        while not self._ended.wait(self._beat):
            number += 1
            try:
                self._count(number)
                found = {other: self._heard(other) for other in self._others}
                if ends is None and self._notes.check([ENDED]):
                    ends = time.monotonic() + self._farewell
                if ends is not None and time.monotonic() > ends:
                    self._end(self._notes.get(ENDED).decode())
                    return
            except Exception:  # the store has gone, and with it the run: whoever waits for the others learns of it
                return
            for other, count in found.items():
                before, since = heard[other]
                silent = time.monotonic() - since
                if count != before:
                    heard[other] = (count, time.monotonic())
                    if other in named:
                        _log.warning("rank %d counts again", other)
                        named.discard(other)
                elif silent > self._silence and other not in named:
                    _log.warning("rank %d has given no sign of life for %.0f s: has it been stopped?", other, silent)
                    named.add(other)

    def _count(self, number: int) -> None:
        self._store.set(str(self._rank), str(number))

    def _heard(self, other: int) -> int:
        return int(self._store.get(str(other))) if self._store.check([str(other)]) else -1
