"""model.gradient_checkpointing: auto takes what by prediction makes updates fastest within memory."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from engine_cases import UNTIMED, succeed, tiny_recipe
from flowgrove.plan.division import ALONE
from flowgrove.plan.memory import GPU_SHARE
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.plan_view import draw_ways
from flowgrove.setup import Setup
from flowgrove.tuning import checkpointing
from flowgrove.tuning.checkpointing import Need, best, needs, settled, settled_here, ways
from policy_cases import small_recipe

MODEL = {
    "adapter": "sd3",
    "path": "tiny",
    "dtype": "bf16",
    "gradient_checkpointing": "auto",
    "lora": {"rank": 4, "alpha": 8},
}
GIB = 2**30
NEEDS = [  # a forward is 1; 10 states train, 5 of them in the first update
    Need("full", 10 * GIB, 1 * GIB, 1.0, 0.9, 10, 5),
    Need("selective", 20 * GIB, 3 * GIB, 1.0, 0.1, 10, 5),
    Need("none", 50 * GIB, 9 * GIB, 1.0, 0.0, 10, 5),
]


@pytest.mark.parametrize(
    ("room", "kinds", "kept", "flops", "taken"),
    [
        (5, [], [0, 0, 0], [9, 1, 0], "full"),  # nothing fits, and that needs least
        (10, ["full"], [0, 0, 0], [9, 1, 0], "full"),
        (20, ["full", "selective"], [5, 0, 0], [4, 1, 0], "selective"),
        (50, ["full", "selective", "none"], [5, 5, 0], [4, -4, 0], "selective"),  # its graphs save five forwards
        (95, ["full", "selective", "none"], [5, 5, 5], [4, -4, -5], "none"),
    ],
)
def test_what_is_computed_again_and_the_graphs_that_then_fit_are_weighed_together(room, kinds, kept, flops, taken):
    setup, total = Setup(small_recipe(model=MODEL)), int((room + 2) * GIB / GPU_SHARE) + 2
    found = ways(setup, NEEDS, True, total, foreign=2 * GIB)
    assert [way.need.kind for way in found if way.fits] == kinds
    assert [way.kept for way in found] == kept
    assert [way.flops for way in found] == pytest.approx(flops)
    assert best(found) == taken


def test_without_graphs_less_is_always_computed_again_where_it_fits():
    setup = Setup(small_recipe(model=MODEL, engine={"reuse_rollout_graph": False}))
    found = ways(setup, NEEDS, True, 100 * GIB)
    assert [way.kept for way in found] == [0, 0, 0]
    assert best(found) == "none"


@pytest.mark.long
def test_needs_are_those_of_the_model():
    setup = Setup(small_recipe(model=MODEL))
    full, selective, none = needs(setup, "cpu")
    states = [states for _, states in setup.first_plan.trained_by_update]
    assert [need.states for need in (full, selective, none)] == [3 * sum(states)] * 3
    assert full.first == 3 * states[0]
    assert full.graph < selective.graph < none.graph
    assert full.forward == selective.forward == none.forward
    assert none.again == 0 < selective.again < 0.2 * full.forward < 0.8 * full.forward < full.again
    compiled = Setup(small_recipe(model=MODEL, engine={"compile": True}))
    assert [need.kind for need in needs(compiled, "cpu")] == ["full", "none"]


def test_another_value_stays_and_ranks_take_the_first_ones(monkeypatch):
    given = Setup(small_recipe())
    assert settled(given, torch.device("cpu")) is given
    assert settled_here(given, "cpu", ALONE) == (given, [])
    setup = Setup(small_recipe(model=MODEL))
    second = SimpleNamespace(size=2, by_first=lambda work: None, chosen=lambda text: "selective")
    monkeypatch.setattr(checkpointing.Division, "of", lambda *_: ALONE)
    found = settled(setup, torch.device("cpu"), second)
    assert found.recipe.model.gradient_checkpointing == "selective"
    assert setup.recipe.model.gradient_checkpointing == "auto"


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_plan_for_a_gpu_that_is_not_here_shows_full_and_says_so(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setup, weighed = settled_here(Setup(small_recipe(model=MODEL, engine={"device": device})), "cuda", ALONE)
    assert (setup.recipe.model.gradient_checkpointing, weighed) == ("full", None)
    told = io.StringIO()
    draw_ways(weighed, setup.recipe, Console(file=told, soft_wrap=True))
    (line,) = told.getvalue().splitlines()
    assert line == "model.gradient_checkpointing: auto is weighed where the run trains, and shown as full here"


@pytest.mark.parametrize("options", [("--memory",), ("--time", "--device", "h100")])
def test_plan_prints_that_line(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("flowgrove.plan.communication.predict", lambda *_: [])
    monkeypatch.setattr("flowgrove.report.plan_view.draw_memory", lambda *_: None)
    monkeypatch.setattr("flowgrove.cost.run_time.predict_time", lambda *_: None)
    recipe = tiny_recipe(tmp_path, model={"gradient_checkpointing": "auto"}, engine={"device": "cuda"})
    assert "and shown as full here" in succeed("plan", recipe, *options).stdout


@pytest.mark.long
def test_a_run_trains_as_with_the_value_that_was_taken(tmp_path):
    lines = {}
    for kind in ("auto", "none"):
        recipe = tiny_recipe(
            tmp_path / kind, model={"gradient_checkpointing": kind}, run={"iterations": 1, "eval_every": 0}
        )
        succeed("train", recipe, "--out", tmp_path / kind / "run")
        (line,) = (tmp_path / kind / "run" / "metrics.jsonl").read_text().splitlines()
        lines[kind] = {key: value for key, value in json.loads(line).items() if key not in UNTIMED}
        stored = load_recipe(tmp_path / kind / "run" / "recipe.yaml")
        assert stored.model.gradient_checkpointing == kind
    assert lines["auto"] == lines["none"]


@pytest.mark.long
def test_the_plan_tells_what_was_weighed(tmp_path):
    told = succeed("plan", tiny_recipe(tmp_path, model={"gradient_checkpointing": "auto"}), "--memory").stdout
    assert "auto weighs" in told
    assert all(f"  {kind}" in told for kind in ("full", "selective", "none"))
    assert "taken here: none" in told
