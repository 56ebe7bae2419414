"""Fixtures of several folders of tests: most of them the kernels'."""

import numpy
import pytest
import torch
from hypothesis import settings

from cuda_on_cpu.emulator import Emulator, compiled
from flowgrove_kernels import libraries, use_backend
from kernel_backends import EMULATED, ON_THE_CPU
from kernel_cases import GOLDEN

settings.register_profile("flowgrove", database=None, deadline=None, derandomize=True)
settings.load_profile("flowgrove")


class TinyFolders(dict):
    """Folders of the tiny pipelines by their names, each written when it is first asked for."""

    def __init__(self, root):
        super().__init__(sd3="tiny")
        self.root = root

    def __missing__(self, name):
        from tiny_families import write_pipeline  # loads diffusers

        self[name] = str(write_pipeline(name, self.root / name))
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """What `model.path` says for each tiny pipeline. Nobody changes what lies there."""
    return TinyFolders(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(params=ON_THE_CPU)
def backend(request):
    """The test runs once on every backend that takes CPU tensors here; with `kernel_backends.AND_EMULATED` also on the
    emulated CUDA kernels.
    """
    if request.param == EMULATED:
        request.getfixturevalue("emulated_kernels")
    name = "cpu" if request.param == EMULATED else request.param
    with use_backend(name):
        yield name


@pytest.fixture(scope="session")
def emulator(kept):
    return Emulator(compiled(kept))


@pytest.fixture
def emulated_kernels(emulator, monkeypatch):
    """The ops of the "cpu" backend are the emulated ones, on an sm_90; what torch.empty returns is NaN."""
    from flowgrove_kernels import native  # loads the compiled libraries

    monkeypatch.setattr(libraries, "missing", lambda name: None)
    monkeypatch.setattr(native, "_ops", torch.ops.flowgrove_emulated)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def reference_backend():
    with use_backend("reference"):
        yield


@pytest.fixture(scope="session")
def kept(request, tmp_path_factory):
    """A folder for what tests compile, kept between runs;
    without pytest's cache (`-p no:cacheprovider`) one of this run.
    """
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("cuda_on_cpu") if cache is not None else tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture(scope="session")
def golden():
    with numpy.load(GOLDEN) as cases:
        return {name: cases[name] for name in cases.files}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
