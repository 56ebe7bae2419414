"""Two import packages under two source roots, and the compiled ops; the metadata is in pyproject.toml.

The ops are compiled where torch and a C++ compiler are installed, without build isolation. FLOWGROVE_CUDA=auto
(default) compiles the CUDA ops where torch is a CUDA build and nvcc is found, 1 insists on them, 0 leaves them out. An
op library that does not compile is left out with a message, unless insisted on.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOTS = {"flowgrove": "engine", "flowgrove_kernels": "kernels"}
ARCHITECTURES = "8.0;9.0a;10.0+PTX"  # where no GPU is visible to ask
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # runs on torch 2.10 and later
CXX = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CXX += ["-Wno-maybe-uninitialized"]  # g++ 12 warns of its own vector intrinsics
NVCC = ["-O3", "-std=c++20", "-DUSE_CUDA", "-fmad=false", "--expt-relaxed-constexpr"]


def sources(folder: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob("*.c*") if path.suffix in (".cpp", ".cu"))


def wanted_cuda(torch, cuda_home) -> bool:
    choice = os.environ.get("FLOWGROVE_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"FLOWGROVE_CUDA is {choice!r}: write 0, 1 or auto")
    possible = bool(torch.version.cuda) and bool(cuda_home)
    if choice == "1" and not possible:
        sys.exit(
            "FLOWGROVE_CUDA=1 needs a CUDA build of torch and nvcc (set CUDA_HOME): install them, "
            "or write FLOWGROVE_CUDA=auto"
        )
    return possible and choice != "0"


def architectures(chosen: str, visible: list[tuple[int, int]], of_torch: list[str]) -> str:
    """What the CUDA ops are compiled for, as TORCH_CUDA_ARCH_LIST says it: what the user chose, else the visible GPUs
    as far as torch knows their kind (`of_torch`: its own sm_…), else ARCHITECTURES.
    """
    if chosen not in ("", "native"):
        return chosen
    known = [divmod(int("".join(filter(str.isdigit, name))), 10) for name in of_torch if name.startswith("sm_")]
    found = sorted({min(capability, max(known, default=capability)) for capability in visible})
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX" if found else ARCHITECTURES


def extensions() -> dict:
    """Arguments of setup() that compile the ops; none where torch is not installed."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print(
            "flowgrove: torch is not installed (or hidden by build isolation): the compiled ops are left out",
            file=sys.stderr,
        )
        return {}
    cuda, listed = wanted_cuda(torch, cpp_extension.CUDA_HOME), "none"
    if cuda:
        visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        listed = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), visible, torch.cuda.get_arch_list())
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed  # torch compiles for these
    include = [str(Path("csrc").absolute())]
    wide = ["-mprefer-vector-width=512"] if os.uname().machine == "x86_64" else []
    stable = {"include_dirs": include, "py_limited_api": True}
    found = [
        cpp_extension.CppExtension(
            "flowgrove_kernels._cpu",
            ["csrc/schemas.cpp", *sources("cpu")],
            extra_compile_args={"cxx": [*CXX, *wide, STABLE_ABI]},
            **stable,
        ),
        Extension(
            "flowgrove_kernels._build_info",
            ["csrc/build_info.cpp"],
            include_dirs=[*include, *cpp_extension.include_paths()],  # torch ships pybind11
            define_macros=[
                ("FLOWGROVE_TORCH", torch.__version__),
                ("FLOWGROVE_CUDA", torch.version.cuda if cuda else "none"),
                ("FLOWGROVE_ARCHITECTURES", listed),
            ],
            extra_compile_args={"cxx": CXX},
            language="c++",
        ),
    ]
    if cuda:
        flags = {"cxx": [*CXX, STABLE_ABI, "-DUSE_CUDA"], "nvcc": [*NVCC, STABLE_ABI]}
        found.append(
            cpp_extension.CUDAExtension("flowgrove_kernels._cuda", sources("cuda"), extra_compile_args=flags, **stable)
        )

    class Build(cpp_extension.BuildExtension):
        """Compiles each library by itself and goes on without those that do not compile."""

        def build_extensions(self):
            insisted = os.environ.get("FLOWGROVE_CUDA") == "1"
            for extension in self.extensions:
                everything, self.extensions = self.extensions, [extension]
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as error:
                    if insisted:
                        raise
                    extension.optional = True  # or copying what was not made fails
                    why = (str(error).splitlines() or [type(error).__name__])[0]
                    print(
                        f"flowgrove: {extension.name} is left out, it did not compile ({why}): "
                        "flowgrove doctor lists what is missing",
                        file=sys.stderr,
                    )
                finally:
                    self.extensions = everything

    return {
        "ext_modules": found,
        "cmdclass": {"build_ext": Build.with_options(use_ninja=True, no_python_abi_suffix=True)},
    }


setup(
    packages=[package for root in ROOTS.values() for package in find_packages(root)],
    package_dir={package: f"{root}/{package}" for package, root in ROOTS.items()},
    **extensions(),
)
