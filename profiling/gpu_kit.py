"""Packs what a GPU machine without network lacks: wheels for its Python, and the op
libraries built for its torch and its GPU.

`make gpu-kit` writes .gpu-kit/ (ignored by git): wheels/, lib/ and kit.json. Copy the repository with
that folder to the machine and run `python3 profiling/gpu_check.py 1` there. The builder needs a Python
3.12 (`make gpu-kit PYTHON312=...`), g++, nvcc 13 and three gigabytes of downloads: torch's CUDA wheel
does not import without NVIDIA's libraries.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / ".gpu-kit"
WORK = ROOT / "build" / "gpu-kit"
LIBRARIES = ("_cpu.so", "_build_info.so", "_cuda.so")
TORCH, TRITON, ARCHITECTURE = "2.11.0", "3.6.0", "9.0a"
PACKAGES = (  # what the machine's image has not
    "annotated-types", "diffusers", "importlib_metadata", "lazy-importer", "narwhals", "nvtx", "plotly", "pydantic",
    "pydantic_core", "torchao", "typing-inspection", "typing_extensions", "zipp",
)  # fmt: skip
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def main() -> None:
    """Builds the kit and prints what it weighs; ends with an error above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12", help="a Python 3.12")
    parser.add_argument("--limit", type=float, default=60, metavar="MIB", help="what the kit may weigh")
    options = parser.parse_args()
    shutil.rmtree(KIT, ignore_errors=True)
    fetch_wheels(options.python)
    build_libraries(options.python)
    manifest = {"torch": TORCH, "triton": TRITON, "architecture": ARCHITECTURE, "sources": sources_digest()}
    (KIT / "kit.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sys.exit(weigh(options.limit))


def pinned() -> dict[str, str]:
    """Package → version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines)
        if version
    }


def sources_digest() -> str:
    """Of everything that the libraries are compiled from."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def fetch_wheels(python: str) -> None:
    """The wheels of PACKAGES in the versions that are tested, without their dependencies."""
    versions = pinned()
    wanted = [f"{name}=={versions[name.lower().replace('_', '-')]}" for name in PACKAGES]
    platforms = [word for name in _PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    _run([
        python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--python-version", "3.12", "--implementation", "cp",
        *platforms, "--dest", str(KIT / "wheels"), *wanted,
    ])  # fmt: skip


def build_libraries(python: str) -> None:
    """Compiles the ops against torch's CUDA build in an environment that is kept for the next time."""
    environment = WORK / "venv"
    if not (environment / "bin" / "python").exists():
        _run([python, "-m", "venv", str(environment)])
    builder = str(environment / "bin" / "python")
    _run(
        [
            builder,
            "-m",
            "pip",
            "install",
            "--quiet",
            f"torch=={TORCH}",
            f"triton=={TRITON}",
            "setuptools<82",
            "ninja",
            "numpy",
        ]
    )
    cuda = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    if not Path(cuda, "bin", "nvcc").exists():
        sys.exit(f"there is no nvcc in {cuda}/bin: set CUDA_HOME to the CUDA 13 toolkit")
    settings = {"CUDA_HOME": cuda, "FLOWGROVE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    command = [
        builder,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(WORK / "lib"),
        "--build-temp",
        str(WORK / "objects"),
    ]
    with (WORK / "build.log").open("w") as log:
        if subprocess.run(
            command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode:
            sys.exit(f"the ops do not compile: see {WORK / 'build.log'}")
    (KIT / "lib").mkdir(parents=True)
    for name in LIBRARIES:
        shutil.copy2(WORK / "lib" / "flowgrove_kernels" / name, KIT / "lib")


def weigh(limit: float) -> int:
    """Prints every file's size; 1 if they are more than `limit` MiB together."""
    files = sorted(path for path in KIT.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 2**20:8.2f} MiB  {path.relative_to(KIT)}")
    total = sum(path.stat().st_size for path in files) / 2**20
    print(f"{total:8.2f} MiB  in all, {limit:g} allowed")
    return int(total > limit)


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
