"""The card, its driver, and the two ceilings that other figures are held against: a large copy, and a large bf16
matrix product. One JSON object on stdout.
"""

import json
import platform
import statistics
import subprocess

import torch

from flowgrove.machine import describe, pick_device
from flowgrove.spans import Totals

_REPEATS = 10


def main() -> None:
    """Takes the GPU where there is one."""
    device = pick_device("auto")
    small = device.type == "cpu"
    found = {**describe(device), "python": platform.python_version(), "driver": _driver(), **_memory(device)}
    found["copy_gb_per_s"] = _copy(device, 2**24 if small else 2**31)
    found["matmul_tflop_per_s"] = _product(device, 512 if small else 8192)
    print(json.dumps(found))


def _seconds(device: torch.device, work) -> float:
    """The median of `_REPEATS` after one that is not timed."""
    work()
    spent = []
    for _ in range(_REPEATS):
        totals = Totals(device)
        with totals("work"):
            work()
        spent.append(totals.seconds["work"])
    return statistics.median(spent)


def _copy(device: torch.device, elements: int) -> float:
    """Bytes read and written, of fp32 random numbers."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return round(8e-9 * elements / _seconds(device, lambda: target.copy_(source)), 1)


def _product(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return round(2e-12 * size**3 / _seconds(device, lambda: a @ b), 2)


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "multiprocessors": properties.multi_processor_count,
    }


def _driver() -> str:
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return told.stdout.strip()


if __name__ == "__main__":
    main()
