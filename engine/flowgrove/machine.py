"""Where a measurement was made: the columns that say so, and whether a shape fits."""

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flowgrove.errors import UserError


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one. Raises UserError for one that is not there."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device is {name!r}: write auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch sees no GPU here: write auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def describe(device: torch.device) -> dict[str, str | int]:
    """The columns that are the same in every row."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _triton(),
        "compiler": f"CUDA {torch.version.cuda}" if device.type == "cuda" else _compiler(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def file_stem(kind: str, device: torch.device) -> str:
    """`kind` and cpu, or the GPU's name: ops_cpu."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return f"{kind}_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    return int(found[1]) * 1024 if found else None


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _compiler() -> str:
    """The first line that the C++ compiler says of itself."""
    command = shutil.which(os.environ.get("CXX") or "c++")
    if command is None:
        return ""
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0].strip() if said else ""
