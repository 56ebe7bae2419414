"""A tracker in a process of its own, seen from the one that trains.

Packages that talk to servers start threads and processes, draw random numbers, take over signals and the ways out of
the process, and W&B's interrupts it where someone stops the run on its page. All that is the other process's own. It
gets one line of JSON per call and the bytes of pictures after it, and tells one line of JSON per thing to tell.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from flowgrove.run.trackers.interface import Opened, Opening, Pictures, Status

_LAST_WORDS = 5.0  # seconds in which what a process that has ended has told is read


class Remote:
    """The tracker `package` in another process, which `open` starts. What the package prints goes to the run's file
    `trackers/PACKAGE.log`; `say` and `warn` get what the user should know. A process that has gone is a RuntimeError.
    """

    def __init__(self, package: str, say: Callable[[str], object], warn: Callable[[str], object]) -> None:
        self._package, self._tellers = package, {"say": say, "warn": warn}
        self._process: subprocess.Popen[bytes] | None = None
        self._abandoned = False

    def open(self, opening: Opening) -> Opened:
        """The id is the other process's: it keeps it in the run's folder."""
        folder = Path(opening.folder) / "trackers"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{self._package}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flowgrove.run.trackers.child", self._package],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)},
                start_new_session=True,  # a terminal's signals end the run and not its trackers
            )
        if self._abandoned:
            self.abandon()
        self._pipe = cast(IO[bytes], self._process.stdin)
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()
        self._send("open", asdict(opening))
        return Opened()

    def numbers(self, iteration: int, values: dict[str, float]) -> None:
        self._send("numbers", {"iteration": iteration, "values": values})

    def pictures(self, completed: int, pictures: Pictures) -> None:
        whole, sources = pictures.tiles, pictures.sources
        if sources is not None:
            whole = np.concatenate([sources, whole], axis=1)
        content = {"prompts": pictures.prompts, "scores": pictures.scores.tolist(), "shape": whole.shape}
        content["sources"] = 0 if sources is None else sources.shape[1]
        self._send("pictures", {"completed": completed, **content}, whole.tobytes())

    def close(self, status: Status) -> None:
        """Returns when the other process has ended."""
        self._send("close", {"status": status})
        process = self._started()
        with suppress(BrokenPipeError):
            self._pipe.close()
        process.wait()
        self._listener.join(_LAST_WORDS)
        if process.returncode:
            raise RuntimeError(self._ended(process))

    def abandon(self) -> None:
        """Ends the other process and those that it has started, whatever they do."""
        self._abandoned = True
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise RuntimeError("its process was not started")
        return self._process

    def _send(self, call: str, content: dict[str, Any], payload: bytes = b"") -> None:
        process = self._started()
        header = json.dumps({"call": call, "bytes": len(payload), "content": content})
        try:
            self._pipe.write(header.encode() + b"\n" + payload)
            self._pipe.flush()
        except BrokenPipeError:
            process.wait()
            raise RuntimeError(self._ended(process)) from None

    def _ended(self, process: "subprocess.Popen[bytes]") -> str:
        return f"its process has ended with exit code {process.returncode}, see trackers/{self._package}.log"

    def _listen(self, told: IO[bytes]) -> None:
        for line in told:
            with suppress(ValueError, KeyError, OSError):  # the terminal may be gone
                for teller, text in json.loads(line).items():
                    self._tellers[teller](text)
