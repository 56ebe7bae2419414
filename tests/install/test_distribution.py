"""What is shipped: the sdist and the wheel hold what they should, and flowgrove_kernels works beside torch alone."""

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

from flowgrove_kernels import flow_logprob, flow_step, step_coefficients
from subprocesses import ROOT, python

pytest.importorskip("build")

PACKAGES = ("engine/flowgrove", "kernels/flowgrove_kernels")
CXX = shutil.which(os.environ.get("CXX", "c++"))
WITHOUT_CUDA = {"FLOWGROVE_CUDA": "0", "MAX_JOBS": "2"}
NOT_SHIPPED = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
PROGRAM = """
import importlib, json, sys
import torch
import flowgrove_kernels as fk
from flowgrove_kernels.compat.dance_grpo import flux_step
from flowgrove_kernels.compat.flow_grpo import sde_step_with_logprob
from flowgrove_kernels.compat.mix_grpo import dance_grpo_step, flow_grpo_step

coef = fk.step_coefficients("flow_sde", 0.75, 0.5, noise_level=0.7)[[0, 0, 0]]
x, v, z = (torch.linspace(-i, 1, 3 * 130).sin().view(3, 130) for i in (1, 2, 3))
found = {}
for backend in fk.available_backends():
    with fk.use_backend(backend):
        v.requires_grad_().grad = None
        x_next, logp = fk.flow_step(x, v, coef, noise=z)
        assert torch.equal(logp, fk.flow_logprob(x, v, x_next, coef))
        weight = torch.full((3,), 1 / 3)
        loss = fk.grpo_loss(x, v, x_next, coef, logp - 0.01, weight, weight, clip_range=0.02).loss
        loss.backward()
        key = fk.NoiseKey(0, 0, 0, 0, torch.arange(3))
        drawn = fk.flow_step(x, v, coef, key=key)[0]
        found[backend] = {"logp": logp.tolist(), "grad": v.grad.norm().item(), "drawn": drawn.sum().item()}

sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
scheduler = type("Scheduler", (), {"sigmas": sigmas, "timesteps": 1000 * sigmas[:-1]})()
for step in (
    lambda after: sde_step_with_logprob(scheduler, v, torch.tensor([750.0]), x, prev_sample=after)[:2],
    lambda after: flux_step(v, x, 0.3, sigmas, 1, after, True, True)[::2],
    lambda after: dance_grpo_step(v, x, 0.3, sigmas, 1, after, True, True)[::2],
    lambda after: flow_grpo_step(v, x, 0.7, sigmas, 1, after)[::2][:2],
):
    after, logp = step(None)
    assert torch.equal(step(after)[1], logp)
    logp.sum().backward()
try:
    importlib.import_module("flowgrove_kernels.compat.scheduler")
except ImportError as error:
    assert "needs diffusers" in str(error), error
else:
    raise AssertionError("diffusers is here")
modules = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"backends": found, "file": fk.__file__, "modules": modules}))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git holds of the packages and of what builds them."""
    to = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for folder in ("csrc", *PACKAGES):
        shutil.copytree(ROOT / folder, to / folder, ignore=NOT_SHIPPED)
    return to


def package_files(checkout) -> set[str]:
    """Every file of the two packages, as an installation names it."""
    found = set()
    for package in PACKAGES:
        root = checkout / package
        found |= {path.relative_to(root.parent).as_posix() for path in root.rglob("*") if path.is_file()}
    return found - {path for path in found if "__pycache__" in path}


def build(checkout, to, *kinds: str) -> str:
    """Runs `python -m build` without network; returns what it printed."""
    options = {"env": WITHOUT_CUDA, "cwd": checkout}
    done = python("-m", "build", "--no-isolation", *kinds, "--outdir", to, ".", **options)
    return done.stdout + done.stderr


def assert_no_forgotten_packages(log: str) -> None:
    assert "absent from" not in log
    assert "would be ignored" not in log


def test_the_sdist_holds_sources_headers_and_data(checkout, tmp_path):
    assert_no_forgotten_packages(build(checkout, tmp_path, "--sdist"))
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    sources = {path.relative_to(checkout).as_posix() for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in sources} == {".h", ".cpp", ".cu", ".cuh"}
    assert sources <= names
    assert {
        f"{'engine' if name.startswith('flowgrove/') else 'kernels'}/{name}" for name in package_files(checkout)
    } <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith("tests/")]


def test_an_installation_holds_every_module_and_data_file(checkout, tmp_path):
    done = python("setup.py", "build_py", "--build-lib", tmp_path, env=WITHOUT_CUDA, cwd=checkout)
    assert_no_forgotten_packages(done.stdout + done.stderr)
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in built if not name.endswith(".pyc")} == package_files(checkout)
    kinds = ("json", "j2", "typed", "safetensors")
    assert all([name for name in built if name.endswith("." + kind)] for kind in kinds)
    assert "flowgrove_kernels/compat/flow_grpo.py" in built


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory):
    """(sdist, the wheel that is built from it, what was printed)."""
    to = tmp_path_factory.mktemp("dist")
    log = build(checkout, to)
    (sdist,), (wheel,) = to.glob("*.tar.gz"), to.glob("*.whl")
    return sdist, wheel, log


def needed_by(name: str) -> set[str]:
    """The installed distributions that `name` requires, itself included."""
    found, pending = set(), [name]
    while pending:
        one = pending.pop()
        try:
            required = metadata.requires(one) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(one)
        names = {re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line}
        pending += names - found
    return found


def fresh_environment(folder: Path, *extra: str) -> Path:
    """A virtual environment that sees torch, what torch needs and `extra`, and nothing else; returns its Python."""
    seen = folder / "seen"
    seen.mkdir(parents=True)
    for name in set().union(*map(needed_by, ("torch", *extra))):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__", "/"}:
            if not (seen / top).exists():
                (seen / top).symlink_to(Path(distribution.locate_file(top)))
    python("-m", "venv", "--without-pip", folder / "venv")
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "torch_alone.pth").write_text(f"{seen}\n")
    return folder / "venv" / "bin" / "python"


def install(into: Path, distribution: Path, *options: str) -> str:
    pip = ("-m", "pip", "--python", into, "install", "--no-index", "--no-deps", "--verbose", *options)
    return python(*pip, distribution, env={**WITHOUT_CUDA, "PYTHONPATH": None}).stdout


def run_alone(interpreter: Path, folder: Path) -> dict:
    """What PROGRAM found, run by `interpreter` away from this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLOWGROVE"))}
    command = [interpreter, "-I", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_works(found: dict, interpreter: Path) -> None:
    assert Path(found["file"]).is_relative_to(interpreter.parents[1])
    assert not {"flowgrove", "diffusers", "transformers", "pydantic", "numpy"} & set(found["modules"])
    if CXX:
        assert {"reference", "cpu"} <= set(found["backends"])
    coef = step_coefficients("flow_sde", 0.75, 0.5, noise_level=0.7)[[0, 0, 0]]
    x, v, z = (torch.linspace(-i, 1, 3 * 130).sin().view(3, 130) for i in (1, 2, 3))
    here = flow_logprob(x, v, flow_step(x, v, coef, noise=z)[0], coef).tolist()
    for values in found["backends"].values():
        assert values["logp"] == pytest.approx(here, rel=1e-6)
        assert values["grad"] == pytest.approx(found["backends"]["reference"]["grad"], rel=1e-5)
        assert values["drawn"] == pytest.approx(found["backends"]["reference"]["drawn"], abs=1e-3)


@pytest.mark.long
def test_the_wheel_works_beside_torch_alone(checkout, distributions, tmp_path):
    _, wheel, log = distributions
    assert_no_forgotten_packages(log)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    compiled = {f"flowgrove_kernels/{name}.so" for name in (("_cpu", "_build_info") if CXX else ())}
    assert names == package_files(checkout) | compiled
    interpreter = fresh_environment(tmp_path)
    install(interpreter, wheel)
    assert_works(run_alone(interpreter, tmp_path), interpreter)


@pytest.mark.long
def test_the_sdist_installs_and_works_beside_torch_alone(distributions, tmp_path):
    interpreter = fresh_environment(tmp_path, "setuptools", "wheel")
    log = install(interpreter, distributions[0], "--no-build-isolation")
    assert "is left out" not in log or not CXX
    assert_works(run_alone(interpreter, tmp_path), interpreter)
