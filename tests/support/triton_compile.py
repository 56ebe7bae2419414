"""Compiles what the ops would launch, for GPUs that are not there, and reads what came out."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import flowgrove_kernels.triton  # noqa: F401  registers the kernels
from flowgrove_kernels import backends, use_backend

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became."""

    ttir: str
    ttgir: str
    ptx: str
    resources: dict[str, int]  # REG per thread, STACK and LOCAL bytes, where spilled registers go

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each PTX instruction occurs."""
        return Counter(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]*)\s", self.ptx, re.M))

    def matching(self, pattern: str) -> Counter[str]:
        """The instructions whose whole name matches."""
        return Counter({name: count for name, count in self.instructions.items() if re.fullmatch(pattern, name)})


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: arguments and constants by name, and the launcher's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    def compiled(self, capability: int) -> Compiled:
        """Specialised as the launcher would: None and 1 are constants,
        addresses and integers that 16 divides are known to be so.
        """
        fixed = {param.name for param in self.kernel.params if param.is_constexpr}
        constants = {
            name: value
            for name, value in self.arguments.items()
            if name in fixed or value is None or (isinstance(value, int) and value == 1)
        }
        signature = {name: "constexpr" if name in constants else _type(value) for name, value in self.arguments.items()}
        aligned = [
            i for i, (name, value) in enumerate(self.arguments.items()) if name not in constants and _aligned(value)
        ]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        return Compiled(built.asm["ttir"], built.asm["ttgir"], built.asm["ptx"], _resources(built.asm["cubin"]))


class Operators(TorchDispatchMode):
    """Notes PyTorch's own operators that launch a kernel on a GPU: all but views and empty tensors."""

    def __init__(self, found: list[Any]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace != "flowgrove" and not function.is_view and "empty" not in function.name():
            self.found.append(function.name())
        return function(*args, **kwargs or {})

    def inside(self, implementation: Any) -> Any:
        """The same function: a mode does not see what happens inside of an operator."""

        def noting(*args, **kwargs):
            with self:
                return implementation(*args, **kwargs)

        return noting


def recorded(call: Any) -> list[Launch | str]:
    """What `call` launches on the triton backend, in order: its own kernels, and the names of PyTorch's operators.

    Nothing of its own runs: the tensors that it returns hold no values.
    """
    found: list[Launch | str] = []
    operators = Operators(found)

    def record(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False)) | {
            name: value for name, value in kwargs.items() if name in names
        }
        found.append(Launch(kernel, arguments, {name: value for name, value in kwargs.items() if name not in names}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "missing", lambda backend: None)
        patch.setattr(backends, "takes", lambda backend, device_type: True)
        patch.setattr(triton.runtime.JITFunction, "run", record)
        for (op, backend), implementation in list(backends._implementations.items()):
            if backend == "triton":
                patch.setitem(backends._implementations, (op, backend), operators.inside(implementation))
        with use_backend("triton"), operators:
            call()
    return found


def launches(call: Any) -> dict[str, Launch]:
    """The kernels that `call` launches on the triton backend, by name; the last launch of each."""
    return {launch.kernel.__name__: launch for launch in recorded(call) if isinstance(launch, Launch)}


def names(call: Any) -> list[str]:
    """The names of what `call` launches on the triton backend, in order."""
    return [launch if isinstance(launch, str) else launch.kernel.__name__ for launch in recorded(call)]


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
