"""The numbers of an iteration: read from the device once, written as JSON lines and TensorBoard scalars."""

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import to_host
from flowgrove.files import write_text
from flowgrove.update import UpdateStats


def reward_summary(names: list[str], scores: Tensor) -> dict[str, dict[str, float]]:
    """{name: {mean, std}} of scores [B, rewards] on the CPU."""
    return {name: {"mean": column.mean().item(), "std": column.std(correction=0).item()} for name, column in zip(names, scores.T, strict=True)}


def update_summary(stats: UpdateStats) -> dict[str, float | int | None]:
    """Ratios, clip fractions, KL to the rollout's policy, gradient norm, drift; None where nothing was trained or a number is not finite."""
    if not stats.ratio:
        return dict.fromkeys(("ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "approx_kl", "loss", "grad_norm", "logp_drift"))
    ratio, clipped, log_ratio = (torch.cat(parts).double() for parts in (stats.ratio, stats.clipped, stats.log_ratio))
    numbers = {
        "ratio_mean": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clipped_low": (clipped < 0).double().mean(),
        "clipped_high": (clipped > 0).double().mean(),
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),  # Schulman's k3
        "loss": torch.stack(stats.loss).double().sum(),
        "grad_norm": torch.stack(stats.grad_norm).double().mean(),
        "logp_drift": torch.cat(stats.drift).double().abs().max() if stats.drift and sum(map(len, stats.drift)) else ratio.new_zeros(()),
    }
    values = to_host(torch.stack(list(numbers.values()))).tolist()
    return {name: value if math.isfinite(value) else None for name, value in zip(numbers, values, strict=True)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak allocation, on a CPU the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MetricsLog:
    """metrics.jsonl (always: the report and resuming read it), and TensorBoard if `kinds` asks for it."""

    def __init__(self, folder: Path, kinds: list[str], first_iteration: int) -> None:
        self.path = folder / "metrics.jsonl"
        self.lines = _cut_back(self.path, first_iteration)  # complete lines in the file
        self.board: Any = None
        if "tensorboard" in kinds:
            from torch.utils.tensorboard import SummaryWriter

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
        if self.board is not None:
            for name, value in _flat(line):
                self.board.add_scalar(name, value, line["iteration"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


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
    """Keeps the lines before `iterations` (what came after the checkpoint will be run again) and returns their number."""
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
