"""Which backends the fixture `backend` goes through."""

import os

import pytest

from cuda_on_cpu.emulator import CXX
from flowgrove_kernels import available_backends

INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
ON_THE_CPU = tuple(name for name in available_backends() if name in ("reference", "cpu", *INTERPRETED))
EMULATED = "emulated cuda"  # the CUDA kernels on the CPU: tests/cuda_on_cpu/README.md
NEEDS_A_COMPILER = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def runs_on(*backends: str) -> list[pytest.MarkDecorator]:
    """Marks for a module or a test: it runs once on each of these."""
    params = [pytest.param(name, marks=[NEEDS_A_COMPILER] if name == EMULATED else []) for name in backends]
    return [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("backend", params, indirect=True)]


AND_EMULATED = runs_on(*ON_THE_CPU, EMULATED)
