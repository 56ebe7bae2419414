"""The log of a run: its iterations as JSON lines and TensorBoard scalars, and the JSON lines read back.
Nothing here needs torch.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowgrove.files import write_text

_log = logging.getLogger("flowgrove")


class MetricsLog:
    """metrics.jsonl (always: the report and resuming read it), and TensorBoard if `kinds` asks for it."""

    def __init__(self, folder: Path, kinds: list[str], first_iteration: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.lines = _cut_back(self.path, first_iteration)  # complete lines in the file
        self.board: Any = None
        self._tell_of_thread = threading.excepthook
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._thread_failed
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_iteration)

    def write(self, line: dict[str, Any]) -> None:
        """Appends one iteration; the line is on disk when this returns."""
        whole = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, whole)  # a full disk leaves no half of a line
            raise
        self.lines += 1
        self._to_board(lambda board: [board.add_scalar(*one, line["iteration"]) for one in _flat(line)])

    def close(self) -> None:
        self._to_board(lambda board: board.close())
        threading.excepthook = self._tell_of_thread

    def _to_board(self, work: Callable[[Any], object]) -> None:
        """TensorBoard shows what metrics.jsonl holds: without room for it the run goes on."""
        if self.board is None:
            return
        try:
            work(self.board)
        except OSError as error:
            self.board = None
            _log.warning("TensorBoard gets no more metrics: %s; metrics.jsonl does", error.strerror or error)

    def _thread_failed(self, failed: Any) -> None:
        """TensorBoard's thread has its errors raised anew when the next line is written: they need no trace besides."""
        if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            self._tell_of_thread(failed)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The iterations of a run's metrics.jsonl, in their order and each once: of several lines the last.

    Lines end at \\n alone. What is damaged, half-written or of another kind is passed over.
    """
    path = folder / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict) or type(number := line.get("iteration")) is not int or number < 0:
            continue
        if "reward" in line or "reward" not in found.get(number, {}):  # another program may note iterations too
            found[number] = line
    return [found[number] for number in sorted(found)]


def _cut_back(path: Path, iterations: int) -> int:
    """Keeps the lines before `iterations` (what came after the checkpoint will be run again)
    and returns their number.
    """
    kept = [line for line in read_metrics(path.parent) if line["iteration"] < iterations]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return len(kept)


def _flat(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "iteration":
            found.append((prefix + name, float(value)))
    return found
