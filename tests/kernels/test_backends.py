"""The choice of a backend: use_backend, FLOWGROVE_BACKEND, and the reference for float64."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from flowgrove_kernels import available_backends, backends, clean_estimate, libraries, use_backend
from flowgrove_kernels.loss_arguments import SCHEMA
from kernel_cases import randn
from subprocesses import python

X, V, SIGMA = randn(3, 5, seed=1), randn(3, 5, seed=2), torch.tensor([0.9, 0.7, 0.3])


@pytest.fixture
def calls(monkeypatch):
    """Names the backend of every clean_estimate; a stand-in computes it on "cpu", whether or not that is built here."""
    names, reference = [], backends._implementations["clean_estimate", "reference"]

    def spy(name, *args):
        names.append(name)
        return reference(*args)

    monkeypatch.setattr(libraries, "_load", {"cpu": None, "cuda": "not compiled"}.get)
    for name in ("reference", "cpu"):
        monkeypatch.setitem(backends._implementations, ("clean_estimate", name), partial(spy, name))
    monkeypatch.delenv("FLOWGROVE_BACKEND", raising=False)
    return names


def test_available_backends_are_known_names_in_order():
    assert "reference" in available_backends()
    assert list(available_backends()) == [
        name for name in ("reference", "cpu", "triton", "cuda") if name in available_backends()
    ]


def test_unknown_backends_are_errors_that_list_the_choices():
    with pytest.raises(ValueError, match="tpu") as error, use_backend("tpu"):
        pass
    assert all(name in str(error.value) for name in available_backends())


def test_use_backend_chooses_inside_the_block_only(monkeypatch, calls):
    monkeypatch.setenv("FLOWGROVE_BACKEND", "cpu")
    with use_backend("reference"):
        clean_estimate(X, V, SIGMA)
        with use_backend("cpu"):
            clean_estimate(X, V, SIGMA)
        clean_estimate(X, V, SIGMA)
    clean_estimate(X, V, SIGMA)
    assert calls == ["reference", "cpu", "reference", "cpu"]


def test_a_refused_name_and_an_exception_leave_the_choice_as_it_was(monkeypatch, calls):
    monkeypatch.setenv("FLOWGROVE_BACKEND", "cpu")
    with use_backend("reference"):
        with pytest.raises(ValueError, match="tpu"), use_backend("tpu"):
            pass
        clean_estimate(X, V, SIGMA)
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    clean_estimate(X, V, SIGMA)
    assert calls == ["reference", "cpu"]


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_environment_chooses_a_backend(name, monkeypatch, calls):
    monkeypatch.setenv("FLOWGROVE_BACKEND", name)
    clean_estimate(X, V, SIGMA)
    assert calls == [name]


def test_an_unknown_name_in_the_environment_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv("FLOWGROVE_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"FLOWGROVE_BACKEND.*tpu") as error:
        clean_estimate(X, V, SIGMA)
    assert "reference" in str(error.value)


def test_the_choice_holds_for_other_threads(calls):
    with use_backend("cpu"), ThreadPoolExecutor(1) as pool:
        pool.submit(clean_estimate, X, V, SIGMA).result()
    assert calls == ["cpu"]


def test_blocks_of_two_threads_that_overlap_are_left_each_by_itself(calls):
    entered, left = Event(), Event()

    def other():
        with use_backend("cpu"):
            entered.set()
            clean_estimate(X, V, SIGMA)
            assert left.wait(10)
            clean_estimate(X, V, SIGMA)

    with ThreadPoolExecutor(1) as pool:
        with use_backend("reference"):
            running = pool.submit(other)
            assert entered.wait(10)
            clean_estimate(X, V, SIGMA)  # a thread's own block counts before one entered later by another
        left.set()
        running.result()
    assert sorted(calls) == ["cpu", "cpu", "reference"]
    assert backends.forced() is None


def test_a_block_may_be_a_decorator_that_calls_itself(calls):
    @use_backend("reference")
    def run(times):
        clean_estimate(X, V, SIGMA)
        if times > 1:
            run(times - 1)

    run(2)
    assert calls == ["reference", "reference"]
    assert backends.forced() is None


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_block_inside_of_what_is_compiled_counts_or_is_an_error(calls):
    def function(x):
        with use_backend("reference"):
            inside = clean_estimate(x, V, SIGMA)
        return inside + 1

    with use_backend("cpu"):
        torch.compile(function, backend="eager")(X)
        assert calls == ["reference"]
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="enter it outside of what is compiled"):
            torch.compile(function, backend="eager", fullgraph=True)(X)
    assert backends.forced() is None


@pytest.mark.parametrize(("left_out", "fits"), [("", True), ("Tensor? old_logp, ", False), (None, False)])
def test_a_library_of_another_version_is_missing(monkeypatch, tmp_path, left_out, fits):
    schema = f"grpo_loss(Tensor? grad_loss, {SCHEMA.replace('SymInt', 'int')}, Tensor(a!) loss, Tensor(b!) logp)"
    op = None if left_out is None else SimpleNamespace(_schema=schema.replace(left_out, ""))
    (tmp_path / "_cpu.so").touch()
    monkeypatch.setattr(libraries, "_HERE", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(libraries, "_loss", lambda: op and SimpleNamespace(default=op))
    reason = "_cpu.so does not fit this version of flowgrove_kernels: compile it again (pip install"
    assert str(libraries._load.__wrapped__("cpu")).startswith("None" if fits else reason)


def test_importing_leaves_the_compiler_of_torch_alone():
    python("-c", "import sys, flowgrove_kernels; assert 'torch._dynamo' not in sys.modules")


def test_float64_takes_the_reference_on_every_backend(calls):
    with use_backend("cpu"):
        clean_estimate(X.double(), V.double(), SIGMA.double())
        clean_estimate(X, V, SIGMA)
    assert calls == ["reference", "cpu"]
