"""engine.device and engine.backend: what a recipe asks for, what is here, and what a run then uses."""

import pytest
import torch

from engine_cases import metrics_of, succeed, timeless, tiny_recipe
from flowgrove.device import pick_backend
from flowgrove.doctor import findings
from flowgrove.errors import UserError
from flowgrove.recipe.loading import load_recipe
from flowgrove_kernels import available_backends, backends, clean_estimate, libraries

X = torch.ones(2, 3)


@pytest.fixture
def used(monkeypatch):
    """The backend of every clean_estimate inside the test; each is the reference by another name."""
    names = []

    def spy(name):
        reference = backends._implementations["clean_estimate", "reference"]
        monkeypatch.setitem(
            backends._implementations, ("clean_estimate", name), lambda *args: names.append(name) or reference(*args)
        )

    monkeypatch.setattr(libraries, "_load", {"cpu": None, "cuda": "it was not compiled"}.get)
    monkeypatch.delenv("FLOWGROVE_BACKEND", raising=False)
    spy("cpu")
    spy("reference")
    return names


def recipe_with(folder, backend):
    return load_recipe(tiny_recipe(folder, engine={"device": "cpu", "backend": backend}))


@pytest.mark.parametrize(
    ("asked", "environment", "runs"),
    [
        ("auto", None, "cpu"),
        ("reference", None, "reference"),
        ("auto", "reference", "reference"),
        ("cpu", "reference", "cpu"),
    ],
)
def test_the_recipe_decides_then_the_environment_then_the_device(asked, environment, runs, used, tmp_path, monkeypatch):
    if environment:
        monkeypatch.setenv("FLOWGROVE_BACKEND", environment)
    with pick_backend(recipe_with(tmp_path, asked)):
        clean_estimate(X, X, 0.5)
    assert used == [runs]


def test_a_backend_that_was_not_compiled_says_why(used, tmp_path):
    with pytest.raises(UserError, match=r"engine\.backend is cuda.*not compiled.*write one of auto, reference, cpu$"):
        pick_backend(recipe_with(tmp_path, "cuda"))


def test_an_unknown_name_in_the_environment(used, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWGROVE_BACKEND", "tpu")
    with pytest.raises(UserError, match="FLOWGROVE_BACKEND is tpu: write one of auto"):
        pick_backend(recipe_with(tmp_path, "auto"))


def test_a_backend_of_another_device(used, tmp_path, monkeypatch):
    monkeypatch.setattr("flowgrove.device.missing", lambda name: None)
    with pytest.raises(UserError, match=r"engine\.backend is cuda, which takes no cpu tensors"):
        pick_backend(recipe_with(tmp_path, "cuda"))


@pytest.mark.skipif("cpu" not in available_backends(), reason="the compiled ops are not here")
def test_runs_on_two_backends_agree_and_repeat(tmp_path):
    """The first iteration's rollouts differ by rounding alone; the same backend repeats to the last bit."""
    lines = {}
    for name, backend in (("cpu", "cpu"), ("auto", "auto"), ("reference", "reference")):
        recipe = tiny_recipe(
            tmp_path / name, engine={"device": "cpu", "backend": backend}, run={"iterations": 1, "log": ["jsonl"]}
        )
        succeed("train", recipe, "--out", tmp_path / name / "run")
        (lines[name],) = timeless(metrics_of(tmp_path / name / "run"))
    assert lines["auto"] == lines["cpu"]
    assert lines["cpu"]["reward"]["shapes"]["mean"] == pytest.approx(
        lines["reference"]["reward"]["shapes"]["mean"], abs=1e-3
    )
    assert lines["cpu"]["grad_norm"] == pytest.approx(lines["reference"]["grad_norm"], rel=1e-2)
    assert lines["cpu"]["logp_drift"] <= 5e-7


def test_doctor_names_every_backend():
    found = dict(findings())
    for name in ("reference", "cpu", "triton", "cuda"):
        state = found[f"backend {name}"]
        assert (state == "available") == (name in available_backends())
        assert state == "available" or state.startswith("missing: ")
    assert found["backend reference"] == "available"
    assert "on cpu tensors" in found["backend auto"]
