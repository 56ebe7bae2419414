"""The CUDA sources compile for every architecture we ship, without a GPU:
registers, spills, 16-byte accesses, device headers free of torch.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
HEADERS = sorted((CSRC / "cuda").glob("*.cuh"))
DEVICE_HEADERS = [path for path in HEADERS if not path.stem.endswith("launch")]
LAUNCHED = {path: path.with_stem(f"{path.stem}_launch") for path in DEVICE_HEADERS}
# A header of launches that begins with the device header, as one test holds it to, compiles that one alone too.
ALONE = [path for path in HEADERS if not LAUNCHED.get(path, path / "none").exists()]
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++20", "-O3", "-fmad=false", f"-I{CSRC}")
TORCH = (
    f"-I{Path(torch.__file__).parent / 'include'}",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "--expt-relaxed-constexpr",
)
# A thread's registers where blocks of 256 threads fill the 65,536 of a multiprocessor: four blocks, two without 16-byte
# accesses.
REGISTERS, REGISTERS_TWO_BLOCKS = 64, 128
# Three blocks where flow_step draws two normals for each element; two for the loss under guard, which draws beside its
# residuals.
REGISTERS_MIXED = 80
# Kernels that stream rows through registers, and which of their accesses are 16 bytes wide.
READ, WRITE = "ld.global.nc.v4.u32", "st.global.v4.u32"
STREAMING = {
    "philox_normal_kernel": {WRITE},
    "clean_estimate_kernel": {READ, WRITE},
    "flow_step_kernel": {READ, WRITE},
    "flow_logprob_kernel": {READ},
    "flow_logprob_backward_kernel": {READ, WRITE},
    "grpo_loss_kernel": {READ, WRITE},
    "grpo_gradient_kernel": {READ, WRITE},
}


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for home in [*filter(None, homes), "/usr/local/cuda"]:
        if os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not installed (looked at CUDA_HOME, /usr/local/cuda and PATH)"
)


@dataclass(frozen=True)
class Resources:
    kernel: str
    architecture: str
    registers: int
    stack: int
    spills: int


def nvcc(*arguments: str) -> str:
    """What the compiler says; fails the test with it where it does not compile."""
    done = subprocess.run([str(NVCC), *FLAGS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def resources(source: Path, folder: Path) -> tuple[Resources, ...]:
    """Compiles one source for all architectures; what ptxas says of each kernel."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    said = nvcc("-c", "-Xptxas=-v", *targets, *TORCH, str(source), "-o", str(folder / f"{source.stem}.o"))
    pattern = (
        r"entry function '(\w+)' for 'sm_(\w+)'\n.*\n"
        r" +(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return tuple(
        Resources(kernel, architecture, int(registers), int(stack), int(stores) + int(loads))
        for kernel, architecture, stack, stores, loads, registers in re.findall(pattern, said)
    )


def kernel_name(mangled: str) -> str:
    found = re.search(r"\d([a-z][a-z_]*_kernel)", mangled)
    return found[1] if found else mangled


@cache
def ptx(header: Path, folder: Path) -> dict[str, str]:
    """Compiles a header alone; the PTX of each kernel in it."""
    alone = folder / f"{header.stem}_alone.cu"
    alone.write_text(f'#include "cuda/{header.name}"\n')
    nvcc("-ptx", "-arch=compute_90a", str(alone), "-o", str(alone.with_suffix(".ptx")))
    entries = alone.with_suffix(".ptx").read_text().split(".entry ")[1:]
    kernels: dict[str, str] = {}
    for entry in entries:  # the instances of one kernel together
        name = kernel_name(entry.split("(", 1)[0])
        kernels[name] = kernels.get(name, "") + entry
    return kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_kernels_compile_without_spills_for_several_blocks_a_multiprocessor(source, folder):
    kernels = resources(source, folder)
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    for kernel in kernels:
        assert kernel.stack == kernel.spills == 0, kernel
        two_blocks = re.search("LayoutILb0E|grpo_loss_kernel.*Lb1EEEv", kernel.kernel)
        mixed = "DrawE2E" in kernel.kernel
        assert kernel.registers <= (REGISTERS_TWO_BLOCKS if two_blocks else REGISTERS_MIXED if mixed else REGISTERS), (
            kernel
        )


@pytest.mark.parametrize("header", DEVICE_HEADERS, ids=lambda path: path.name)
def test_device_headers_plan_and_launch_nothing(header):
    """What runs on the host lies in the *launch.cuh beside them."""
    text = header.read_text(encoding="utf-8")
    assert re.findall(r'cudaStream_t|cudaError_t|cudaDevAttr\w+|<<<|"cuda/\w*launch\.cuh"|^inline ', text, re.M) == []


def test_headers_of_launches_begin_with_what_they_launch():
    for header, launches in LAUNCHED.items():
        if launches.exists():
            assert re.findall(r'#include "(.*)"', launches.read_text(encoding="utf-8"))[0] == f"cuda/{header.name}"
    assert len(ALONE) == len(HEADERS) - sum(launches.exists() for launches in LAUNCHED.values())


@pytest.mark.parametrize("header", ALONE, ids=lambda path: path.name)
def test_headers_compile_alone_and_move_16_bytes_at_a_time(header, folder):
    kernels = ptx(header, folder)
    for name in STREAMING.keys() & kernels.keys():
        for access in STREAMING[name]:
            assert access in kernels[name], f"{name} has no {access}"


def test_every_streaming_kernel_was_looked_at(folder):
    assert STREAMING.keys() <= {name for header in ALONE for name in ptx(header, folder)}
