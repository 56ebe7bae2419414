"""Fixtures of the kernel tests."""

import os

import numpy
import pytest
import torch
from hypothesis import settings

from flowgrove_kernels import available_backends, use_backend
from kernel_cases import GOLDEN

INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
ON_THE_CPU = tuple(name for name in available_backends() if name in ("reference", "cpu", *INTERPRETED))

settings.register_profile("flowgrove", database=None, deadline=None, derandomize=True)
settings.load_profile("flowgrove")


@pytest.fixture(params=ON_THE_CPU)
def backend(request):
    """The test runs once on every backend that takes CPU tensors here."""
    with use_backend(request.param):
        yield request.param


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
