"""What an installation has, and what it lacks."""

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from flowgrove.models.folders import TINY
from flowgrove.run.trackers.registry import installed_line
from flowgrove.update.optimizers import is_unrelated_apex
from flowgrove_kernels.backends import BACKENDS, automatic, missing

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "pydantic",
    "tensorboard",
    "triton",
    "nvtx",
    "flash-attn",
    "xformers",
)
_OPTIONAL = ("pyarrow", "torchvision", "torchao", "bitsandbytes", "apex", "av", "rapidocr")


def findings() -> list[tuple[str, str]]:
    """(name, finding) pairs."""
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows += [(name, _version(name)) for name in (*_PACKAGES, *_OPTIONAL)]
    rows.append(("cpu threads", str(torch.get_num_threads())))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory, capability = f"{device.total_memory / 2**30:.0f} GiB", f"{device.major}.{device.minor}"
            rows.append((f"gpu {index}", f"{device.name}, {memory}, compute capability {capability}"))
    else:
        rows.append(("gpu", "none that torch sees: training runs on the CPU"))
    rows += _backends()
    rows.append(("attention", _attention()))
    rows.append(("trackers", installed_line()))
    rows.append(
        (
            "embedded pipeline",
            "present"
            if (TINY / "model_index.json").is_file()
            else "missing: python -m flowgrove.tiny.build --out " + str(TINY),
        )
    )
    return rows


def _backends() -> list[tuple[str, str]]:
    """Which implementations of the fused ops can run, why others cannot, and how the compiled ones were built."""
    rows = [
        (f"backend {name}", "available" if (reason := missing(name)) is None else f"missing: {reason}")
        for name in BACKENDS
    ]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows.append(("backend auto", ", ".join(f"{automatic(device)} on {device} tensors" for device in devices)))
    try:
        build = import_module("flowgrove_kernels._build_info")
    except ImportError:
        return rows
    rows.append(
        (
            "compiled with",
            f"{build.compiler}, torch {build.torch}, CUDA {build.cuda}, GPU architectures {build.cuda_architectures}",
        )
    )
    rows.append(("cpu instructions", build.instruction_set()))
    return rows


def _attention() -> str:
    """What engine.attention may say here."""
    from flowgrove.models.attention import attention_names, missing

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = [name for name in attention_names() if missing(name, device) is None]
    others = "; ".join(f"{name}: {missing(name, device) or 'usable'}" for name in ("flash", "xformers"))
    return f"usable on {device.type}: {', '.join(usable)}; {others}"


def _version(name: str) -> str:
    try:
        found = version(name)
    except PackageNotFoundError:
        return "not installed"
    if name == "apex" and is_unrelated_apex():
        return f"{found}, the unrelated package of that name on PyPI: NVIDIA's apex is built from its source"
    return found
