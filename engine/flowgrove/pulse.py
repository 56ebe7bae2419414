"""Whether the other ranks of a run are alive: a thread that counts in the store that they all see, and watches theirs.

Slowness is not death: a rank that waits for a reward or loads a model goes on counting. One that was killed closes its
connections, which those that wait for it on the host notice by themselves; those that wait on a GPU do not, so that the
ranks of a machine also look whether each other's processes are there. One that was stopped or whose machine hangs stops
counting.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

_log = logging.getLogger("flowgrove")
_BEAT = 1.0  # seconds from one count to the next
_SILENCE = 15.0  # seconds without a count before a rank is named
_FAREWELL = 10.0  # seconds that a rank has to end by itself once one of them has ended the run; half, if one has gone
NOTES, ENDED = "notes", "ended"  # where in the store ranks leave notes, and the note of what has ended the run
USER, OTHER, GONE = "u", "o", "g"  # how that note begins: an error for the user, another one, a rank that has gone
_LEFT = "left"  # the process of a rank whose part of the run is over


class Pulse:
    """Context manager: inside, this rank counts under its number in `store`; the first says which of `size` do not,
    and the second whether the first does. A rank whose process has gone before it left the block ends the run. `end`
    gets the note of what has ended the run when this rank has not ended soon after it: it waits in a collective for one
    that has gone.
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
        process: str | None = None,
    ) -> None:
        self._store, self._notes = dist.PrefixStore("pulse", store), dist.PrefixStore(NOTES, store)
        self._end, self._farewell = end, farewell
        # one rank names another: the first, and of the first the second
        self._rank, self._others = rank, [other for other in range(size) if other != rank == (0 if other else 1)]
        self._unseen = set(range(size)) - {rank}  # ranks of which is not known yet where they run
        self._beside: dict[int, int] = {}  # those whose processes this one can see
        self._process = this_process() if process is None else process
        self._beat, self._silence = beat, silence
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        self._count(0)
        self._store.set(f"process of {self._rank}", self._process)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        # a thread that still waits for a slow answer when the process ends would take it down with a crash
        self._thread.join(60 * self._beat)
        with suppress(Exception):  # the store may have gone
            self._store.set(f"process of {self._rank}", _LEFT)

    def _run(self) -> None:
        heard = {other: (-1, time.monotonic()) for other in self._others}
        named: set[int] = set()
        number, ends = 0, None
        while not self._over.wait(self._beat):
            number += 1
            try:
                self._count(number)
                found = {other: self._heard(other) for other in self._others}
                self._look_for_gone()
                if ends is None and self._notes.check([ENDED]):
                    gone = self._notes.get(ENDED).decode().startswith(GONE)
                    ends = time.monotonic() + self._farewell * (0.5 if gone else 1)
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
                elif silent > self._silence and other not in named and self._process_of(other) != _LEFT:
                    _log.warning("rank %d has given no sign of life for %.0f s: has it been stopped?", other, silent)
                    named.add(other)

    def _look_for_gone(self) -> None:
        """Leaves the note that ends the run where a process that this one can see has gone in the middle of it."""
        place = self._process.rpartition(" ")[0]
        for other in sorted(self._unseen):
            found = self._process_of(other)
            if found is not None:
                self._unseen.discard(other)
                if place and found.rpartition(" ")[0] == place:
                    self._beside[other] = int(found.rpartition(" ")[2])
        for other, pid in list(self._beside.items()):
            if Path(f"/proc/{pid}").exists():
                continue
            del self._beside[other]
            if self._process_of(other) != _LEFT and not self._notes.check([ENDED]):
                self._notes.set(ENDED, f"{GONE}{gone_line(f'rank {other}')}")

    def _count(self, number: int) -> None:
        self._store.set(str(self._rank), str(number))

    def _heard(self, other: int) -> int:
        return int(self._store.get(str(other))) if self._store.check([str(other)]) else -1

    def _process_of(self, other: int) -> str | None:
        key = f"process of {other}"
        return self._store.get(key).decode() if self._store.check([key]) else None


def gone_line(who: str) -> str:
    """What the user is told when a rank has gone."""
    return (
        f"{who} of this run has gone, and all others end too; give the same command again: training goes on from the "
        "newest checkpoint"
    )


def this_process() -> str:
    """Names it by machine, namespace and number; "" where nothing tells, so that nobody takes it for gone."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{machine} {os.readlink('/proc/self/ns/pid')} {os.getpid()}"
    except OSError:
        return ""
