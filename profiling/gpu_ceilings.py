"""The card, its driver, and the two ceilings that other figures are held against: a large copy, and a large bf16
matrix product. One JSON object on stdout.
"""

import json
import platform
import subprocess

import torch

from flowgrove.machine import describe, pick_device
from flowgrove.rates.measuring import copy_rate, matrix_rate


def main() -> None:
    """Takes the GPU where there is one."""
    device = pick_device("auto")
    found = {**describe(device), "python": platform.python_version(), "driver": _driver(), **_memory(device)}
    found["copy_gb_per_s"] = round(copy_rate(device, None if device.type == "cpu" else 2**31) / 1e9, 1)
    found["matmul_tflop_per_s"] = round(matrix_rate(device, torch.bfloat16) / 1e12, 2)
    print(json.dumps(found))


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
