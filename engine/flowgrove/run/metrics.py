"""The log of a run: its iterations as JSON lines, written and read back. Nothing here needs torch."""

import json
import os
from pathlib import Path
from typing import Any

from flowgrove.files import write_text


class MetricsLog:
    """metrics.jsonl, which the report and resuming read; its lines from `first_iteration` on will be written anew."""

    def __init__(self, folder: Path, first_iteration: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.lines = _cut_back(self.path, first_iteration)  # complete lines in the file

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
