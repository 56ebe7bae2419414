"""Builds and steers the CUDA kernels on the CPU (README.md)."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC, TORCH = HERE.parents[1] / "csrc", Path(torch.__file__).parent
CXX = shutil.which(os.environ.get("CXX", "g++"))
# No _FORTIFY_SOURCE, which some distributions switch on: it ends a program that jumps from one stack to another, as the
# fibers do.
FLAGS = (
    "-U_FORTIFY_SOURCE",
    "-std=c++20",
    "-O1",
    "-g0",
    "-fPIC",
    "-ffp-contract=off",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)

# (major compute capability, most shared memory of a block in bytes, most blocks of a cluster, and how many
# multiprocessors if not MULTIPROCESSORS)
SM_80, SM_90 = (8, 166_912, 16), (9, 232_448, 16)
# the order in which threads run: in turn; block after block, each warp as far as it can; all at random
FAIR, GREEDY, SHUFFLED = range(3)
MULTIPROCESSORS = 132


def compiled(folder: Path) -> Path:
    """The kernels as a library that registers flowgrove_emulated::*; compiled unless `folder` has them from before."""
    sources = sorted(path for place in (HERE, CSRC, CSRC / "cuda") for path in place.glob("*.*") if path.is_file())
    digest = hashlib.sha256(
        repr((CXX, FLAGS, torch.__version__, [path.read_bytes() for path in sources])).encode()
    ).hexdigest()[:16]
    library = folder / f"emulated_{digest}.so"
    if not library.exists():
        include = (f"-I{HERE}", f"-I{CSRC}", "-isystem", str(TORCH / "include"))
        link = ("-shared", "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}")
        fresh = folder / f"{digest}_{os.getpid()}.so"
        subprocess.run(
            [
                str(CXX),
                *FLAGS,
                *include,
                str(HERE / "emulator.cpp"),
                str(HERE / "emulated_ops.cpp"),
                "-o",
                str(fresh),
                *link,
            ],
            check=True,
        )
        for old in folder.glob("emulated_*.so"):
            old.unlink()
        fresh.rename(library)
    return library


class Emulator:
    """The emulated GPU: an sm_90 whose threads run in turn, unless told otherwise."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        torch.ops.load_library(str(library))

    @contextmanager
    def __call__(self, device: tuple[int, ...] = SM_90, order: int = FAIR) -> Iterator[None]:
        """Kernels run as such a device would run them, threads in such an order."""
        self.library.emulated_use_device(*(*device, MULTIPROCESSORS)[:4])
        self.library.emulated_use_order(order)
        yield
        self.library.emulated_use_device(*SM_90, MULTIPROCESSORS)
        self.library.emulated_use_order(FAIR)

    def launches(self, function: Callable[[], object]) -> int:
        before = self.library.emulated_launches()
        function()
        return self.library.emulated_launches() - before
