"""Published peak rates of devices, for plans of runs on devices that are not at hand."""

import difflib
from typing import NamedTuple

from flowgrove.errors import UserError


class Device(NamedTuple):
    """`matrix`: FLOPs per second of dense products by dtype, as the vendor publishes them: bf16 with fp32 accumulation
    on tensor cores, without sparsity, and fp32 without TF32, which runs never use; `copied`: bytes per second of its
    memory; `memory`: its bytes.
    """

    name: str
    matrix: dict[str, float]
    copied: float
    memory: int


def _device(name: str, bf16: float, fp32: float | None, copied: float, memory: int) -> Device:
    """Rates in TFLOP/s and GB/s, memory in GB."""
    matrix = {"bf16": bf16 * 1e12} | ({} if fp32 is None else {"fp32": fp32 * 1e12})
    return Device(name, matrix, copied * 1e9, memory * 10**9)


# NVIDIA's data sheets: of figures "with sparsity" half. The two GeForce cards: the tables of NVIDIA's Ada and Blackwell
# GPU architecture papers, FP16/BF16 tensor with fp32 accumulation.
DEVICES = {
    "a10": _device("NVIDIA A10", 125, 31.2, 600, 24),
    "a100-40gb": _device("NVIDIA A100 40 GB", 312, 19.5, 1555, 40),
    "a100-80gb": _device("NVIDIA A100 80 GB SXM", 312, 19.5, 2039, 80),
    "b200": _device("NVIDIA B200", 2250, None, 7700, 180),
    "h100": _device("NVIDIA H100 SXM", 989.4, 66.9, 3350, 80),
    "h100-pcie": _device("NVIDIA H100 PCIe", 756, 51, 2000, 80),
    "h200": _device("NVIDIA H200", 989.4, 66.9, 4800, 141),
    "l4": _device("NVIDIA L4", 121, 30.3, 300, 24),
    "l40s": _device("NVIDIA L40S", 362, 91.6, 864, 48),
    "rtx-4090": _device("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1008, 24),
    "rtx-5090": _device("NVIDIA GeForce RTX 5090", 209.5, 104.8, 1792, 32),
}

# What slim FLUX reached of the H200's peak in forwards and training passes of 8 rows
# (profiling/figures/rows_flux_slim_nvidia_h200.csv: 374 of 989 TFLOP/s).
UTILISATION = 0.38


def published(name: str) -> Device:
    """A device of the table, in whatever case. Raises UserError with the names that there are."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    if plain in DEVICES:
        return DEVICES[plain]
    near = difflib.get_close_matches(plain, DEVICES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--device is {name}: {hint}known are {', '.join(DEVICES)}")
