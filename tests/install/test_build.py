"""setup.py: the compiled ops are left out where they cannot be compiled, and what was compiled says how."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from flowgrove_kernels import libraries
from subprocesses import python

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(libraries.missing("cpu") is not None, reason="the compiled ops are not here")


@pytest.fixture
def checkout(tmp_path):
    """What a build reads, with empty packages."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for package in ("engine/flowgrove", "kernels/flowgrove_kernels"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


def build(checkout, **environment):
    return python("setup.py", "build_ext", "--inplace", cwd=checkout, env=environment, check=False)


def test_without_a_compiler_the_install_goes_on_and_says_what_is_left_out(checkout):
    done = build(checkout, CXX="/nowhere/c++", CC="/nowhere/cc", FLOWGROVE_CUDA="0")
    assert done.returncode == 0
    assert "flowgrove_kernels._cpu is left out" in done.stderr
    assert "doctor" in done.stderr
    assert not list(checkout.glob("kernels/flowgrove_kernels/*.so"))


@pytest.mark.parametrize("value", ["1", "yes"])
def test_what_is_insisted_on_and_impossible_is_one_line(checkout, value):
    if value == "1" and torch.version.cuda:
        pytest.skip("here the CUDA ops can be insisted on")
    done = build(checkout, FLOWGROVE_CUDA=value)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(("FLOWGROVE_CUDA=1 needs", "FLOWGROVE_CUDA is 'yes'"))
    assert "Traceback" not in done.stderr


@pytest.fixture
def setup_py(monkeypatch):
    """Runs setup.py: its names, and the arguments of the setup() that it calls."""
    monkeypatch.chdir(ROOT)
    called = {}
    monkeypatch.setattr("setuptools.setup", called.update)
    return lambda: (runpy.run_path("setup.py"), called)


@pytest.mark.parametrize(
    ("chosen", "visible", "expected"),
    [
        ("", [], "8.0;9.0a;10.0+PTX"),
        ("native", [], "8.0;9.0a;10.0+PTX"),
        ("", [(9, 0)], "9.0+PTX"),
        ("native", [(9, 0), (8, 0), (9, 0)], "8.0;9.0+PTX"),
        ("", [(12, 1), (9, 0)], "9.0;12.0+PTX"),  # torch knows no 12.1
        ("8.6", [(9, 0)], "8.6"),
        ("Hopper", [], "Hopper"),
    ],
)
def test_architectures_are_those_chosen_or_visible_or_the_usual_ones(chosen, visible, expected, setup_py, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_CUDA", "0")
    assert setup_py()[0]["architectures"](chosen, visible, ["sm_75", "sm_90", "sm_120", "compute_120"]) == expected


@pytest.mark.parametrize("chosen", ["", "8.0;9.0a"])
def test_the_build_information_names_what_torch_compiles_for(chosen, setup_py, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("FLOWGROVE_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda")
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    _, called = setup_py()
    (information,) = (e for e in called["ext_modules"] if e.name == "flowgrove_kernels._build_info")
    named = dict(information.define_macros)["FLOWGROVE_ARCHITECTURES"]
    flags = " ".join(cpp_extension._get_cuda_arch_flags())
    found = re.findall(r"code=sm_(\d+)(\d)(a?)", flags)
    assert named == (chosen or "9.0+PTX")
    assert {f"{major}.{minor}{a}" for major, minor, a in found} == set(named.removesuffix("+PTX").split(";"))
    assert ("code=compute_" in flags) == named.endswith("+PTX")


@compiled
def test_the_libraries_have_no_python_in_them():
    (library,) = (ROOT / "kernels/flowgrove_kernels").glob("_cpu.*so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "libtorch_cpu" in needed
    assert "python" not in needed
    assert not [name for name in symbols if name.startswith("Py")]
    # the stable ABI alone: C functions of libtorch
    assert not [name for name in symbols if "2at6Tensor" in name or "c1010TensorImpl" in name]


@compiled
def test_build_information_is_of_this_build():
    from flowgrove_kernels import _build_info

    assert _build_info.torch == torch.__version__
    assert _build_info.compiler.split()[0] in ("g++", "clang")
    assert _build_info.instruction_set() in ("avx512", "avx2", "baseline")
    assert (_build_info.cuda == "none") == (libraries._load("cuda") is not None)
