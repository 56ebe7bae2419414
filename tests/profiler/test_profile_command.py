"""`flowgrove profile` on the embedded pipeline: what it shows is what was run, and what it writes can be read."""

import csv
import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from engine_cases import flowgrove, refuse, strict_json, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.iteration import NothingScoredError
from flowgrove.plan.flops import count_flops
from flowgrove.profiler import command, rates, session
from flowgrove.profiler.events import Trace
from flowgrove.profiler.memory import GRAPHS, KINDS
from flowgrove.profiler.table import COLUMNS
from flowgrove.rates.kept import keep_rates
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from policy_cases import CPU

PROMPTS, ITERATIONS = 2, 2


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The user's cache folder of these tests alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """Two iterations, whose first updates reuse the rollout's graphs: the folder, the recipe and what was printed."""
    folder = tmp_path_factory.mktemp("profiled")
    recipe = tiny_recipe(folder, engine={"reuse_rollout_graph": True})
    printed = succeed("profile", recipe, "--iterations", ITERATIONS, "--out", folder / "out", "--json").stdout
    return SimpleNamespace(
        folder=folder, out=folder / "out", setup=Setup(load_recipe(recipe, ())), printed=strict_json(printed)
    )


def rows_of(profiled):
    return {row["phase"]: row for row in profiled.printed["phases"]}


def test_the_phases_add_up_to_the_time_of_the_iteration(profiled):
    total = sum(row["seconds"] for row in profiled.printed["phases"] if not row["beside"])
    assert total == pytest.approx(profiled.printed["seconds"], rel=0.02)
    assert sum(row["share"] for row in profiled.printed["phases"]) == pytest.approx(1, rel=0.02)
    assert all(row["seconds"] >= 0 for row in profiled.printed["phases"])


def test_rows_and_passes_are_those_of_the_plan(profiled):
    rows, counts = rows_of(profiled), [profiled.setup.plan(number).counts for number in range(ITERATIONS)]
    forwards = PROMPTS * sum(each.rollout_forwards for each in counts) / ITERATIONS
    trained = PROMPTS * sum(each.train_passes for each in counts) / ITERATIONS
    assert rows["rollout/transformer"]["rows"] == rows["rollout/flow_step"]["rows"] == forwards
    assert rows["update/backward"]["rows"] == rows["update/grpo_loss"]["rows"] == trained
    assert rows["update/transformer"]["rows"] < trained, "the first update's forwards are the rollout's"
    assert rows["reward/decode"]["rows"] == rows["reward/shapes"]["rows"] == PROMPTS * counts[0].leaves
    assert rows["update/optimizer"]["passes"] == 2


def test_flops_are_rows_times_what_the_models_code_takes(profiled):
    rows, (flops,) = rows_of(profiled), count_flops(profiled.setup.recipe)
    for phase, each in (
        ("rollout/transformer", flops.forward),
        ("update/backward", flops.backward),
        ("reward/decode", flops.decode),
    ):
        row = rows[phase]
        assert row["tflop"] == pytest.approx(row["rows"] * each / 1e12)
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["seconds"])
        rate = profiled.printed["matrix_flop_per_s"]
        assert row["utilisation"] == pytest.approx(row["tflop_per_s"] * 1e12 / rate)
    assert rows["credit"]["tflop"] is None


def test_ops_move_what_their_tensors_hold(profiled):
    """Every row reads a state and a velocity and writes its children, fp32 here; what a row has besides is small."""
    rows = rows_of(profiled)
    size = 4 * 4 * 8 * 8
    steps = [step for number in range(ITERATIONS) for step in profiled.setup.plan(number).steps]
    states = PROMPTS * sum(2 * step.nodes_in + step.nodes_out for step in steps) / ITERATIONS
    assert rows["rollout/flow_step"]["gb"] * 1e9 == pytest.approx(states * size, rel=0.12)
    assert rows["rollout/flow_step"]["gb"] * 1e9 > states * size
    assert rows["rollout/transformer"]["gb"] is None
    assert rows["update/grpo_loss"]["gb"] > 0


def test_launches_and_reads_are_of_their_phase(profiled):
    rows = rows_of(profiled)
    assert rows["update/backward"]["launches"] > rows["update/transformer"]["launches"] > 100
    assert rows["rollout/transformer"]["waits"] == rows["update/backward"]["waits"] == 0, "nothing makes the host wait"
    assert rows["update/optimizer"]["launches"] > 0, "also what the optimiser's own range holds"
    told = sum(row["launches"] or 0 for row in profiled.printed["phases"])
    trace = Trace.read(profiled.out / "trace.json.gz")
    assert told == pytest.approx(sum(trace.launches().values()) / ITERATIONS), "every launch has its row"
    assert profiled.printed["idle"] is None, "a CPU has no gaps between kernels"


def test_the_trace_is_json_with_our_ranges(profiled):
    with gzip.open(profiled.out / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    assert {f"iteration {number}/rollout/step 0/transformer" for number in range(ITERATIONS)} <= names
    assert {"iteration 1/reward/shapes", "iteration 1/update/update 1/pass 0/backward"} <= names


def test_the_memory_at_its_fullest_is_the_allocators_and_holds_the_weights(profiled):
    memory = profiled.printed["memory"]
    assert memory["peak"] == sum(memory["at_peak"].values())
    assert memory["peak"] == pytest.approx(memory["told"], rel=0.01)
    assert memory["peaks"][GRAPHS] > 0
    with (profiled.out / "memory.csv").open(encoding="utf-8") as file:
        moments = list(csv.DictReader(file))
    assert list(moments[0]) == ["seconds", *KINDS]
    assert max(sum(int(moment[kind]) for kind in KINDS) for moment in moments) == memory["peak"]
    assert (profiled.out / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_the_files_hold_what_was_shown(profiled):
    assert strict_json((profiled.out / "profile.json").read_text(encoding="utf-8")) == profiled.printed
    with (profiled.out / "phases.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["phase"] for row in rows] == [row["phase"] for row in profiled.printed["phases"]]
    assert {path.name for path in profiled.out.iterdir()} == {
        "phases.csv", "profile.json", "trace.json.gz", "memory.csv", "memory.png",
    }  # fmt: skip
    assert not (profiled.folder / "runs").exists(), "no run folder"


def test_what_is_advised_is_not_what_the_recipe_has(profiled):
    assert len(profiled.printed["suggestions"]) <= 3
    for suggestion in profiled.printed["suggestions"]:
        section, _, key = suggestion["key"].partition(".")
        have = getattr(getattr(profiled.setup.recipe, section), key)
        assert str(have) != suggestion["value"]
        assert suggestion["saves"] is None or 0 < suggestion["saves"] < profiled.printed["seconds"]


def test_the_table_fits_a_terminal_and_says_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(tmp_path)
    done = succeed("profile", recipe, "--warm-up", 0, "--set", "data.prompts_per_iteration=1")
    table = done.stdout.split("sum of the phases")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table), "nothing is cut off"
    assert "rollout/transformer" in done.stdout
    assert "idle gaps between kernels: not measured, needs a GPU" in done.stdout
    assert "mean of 1 without the profiler" in done.stdout
    assert (tmp_path / "profiles" / "mine" / "trace.json.gz").exists()
    assert done.stderr.splitlines() == ["counting the bytes of ops", "timing", "profiling"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"path": "nowhere"}}, "model.path"),
        ({"rollout": {"window": {"strategy": "none"}, "shared_initial_noise": False}}, "nothing would train"),
        ({"engine": {"cuda_graphs": True}}, "engine.cuda_graphs"),
        ({"reward": [{"name": "no_such"}]}, "no_such"),
        ({"engine": {"typo": 1}}, "typo"),
    ],
)
def test_a_recipe_that_does_not_run_is_refused_in_a_line(tmp_path, changes, told):
    assert told in refuse("profile", tiny_recipe(tmp_path, **changes), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_run_is_left_alone(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    line = refuse("profile", tiny_recipe(tmp_path), "--out", tmp_path / "run")
    assert "holds a run: give another folder with --out" in line


def test_an_iteration_that_scores_nothing_ends_with_its_reason(tmp_path, monkeypatch):
    class Stages:
        def __init__(self, *_):
            pass

        def run(self, texts, iteration):
            raise NothingScoredError(UserError("reward shapes failed"))

    monkeypatch.setattr(session, "Stages", Stages)
    assert "reward shapes failed" in refuse_after_notes("profile", tiny_recipe(tmp_path), "--out", tmp_path / "out")


def refuse_after_notes(*arguments):
    """The last line of a command that has said what it does before it fails."""
    result = flowgrove(*arguments)
    assert result.exit_code == 2
    return result.stderr.splitlines()[-1]


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    line = refuse("profile", tiny_recipe(tmp_path))
    assert "flowgrove profile runs in one process, not in 2: leave torchrun out" in line


@pytest.mark.parametrize(
    ("device_type", "room", "fits"),
    [("cpu", 100, True), ("cpu", 99, False), ("cpu", None, False), ("cuda", 200, True), ("cuda", 165, False)],
)
def test_a_recipe_fits_where_prediction_leaves_room(monkeypatch, device_type, room, fits):
    """100 bytes, on a GPU into nine tenths of it beside 50 of rewards' models."""

    class Stored:
        peak, loaded = 100, 30

        def at(self, tokens):
            assert tokens == 7
            return self

    def predicted(setup, kind):
        assert kind == device_type
        return Stored()

    monkeypatch.setattr(Setup, "memory", predicted)
    monkeypatch.setattr(command, "free_memory", lambda device: room)
    monkeypatch.setattr(command, "total_memory", lambda device: room)
    held = SimpleNamespace(
        device=SimpleNamespace(type=device_type),
        policy=SimpleNamespace(bytes_when_loaded=80),
        runner=SimpleNamespace(budget=SimpleNamespace(tokens=7)),
    )
    assert command._fits(held, None) is fits


def test_what_the_device_can_do_is_kept_for_plans(profiled, cache):
    (kept,) = json.loads((cache / "flowgrove" / "rates.json").read_text(encoding="utf-8")).values()
    assert kept["copied"]["rate"] > 0
    assert list(kept["matrix"]) == ["fp32"]


def test_without_room_to_measure_the_rates_that_were_kept_count(cache, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("out of memory")

    keep_rates(CPU, matrix={"fp32": 3.0}, copied=5.0)
    monkeypatch.setattr(rates, "copy_rate", no_room)
    assert rates.ceilings(CPU, "fp32") == (3.0, 5.0)
    assert rates.ceilings(CPU, "bf16") == (None, 5.0)


@pytest.mark.gpu
def test_on_a_gpu_kernels_gaps_and_the_allocators_peak_are_told(tmp_path):
    recipe = tiny_recipe(tmp_path, engine={"device": "cuda"}, model={"dtype": "bf16"})
    found = strict_json(succeed("profile", recipe, "--out", tmp_path / "out", "--warm-up", 2, "--json").stdout)
    rows = {(row["phase"], row["beside"]): row for row in found["phases"]}
    total = sum(row["seconds"] for row in found["phases"] if not row["beside"])
    assert total == pytest.approx(found["seconds"], rel=0.02)
    assert rows["rollout/transformer", False]["launches"] > 100
    assert rows["rollout/transformer", False]["waits"] == rows["update/backward", False]["waits"] == 0
    assert rows["reward/decode", True]["rows"] == 8, "beside the rollout"
    idle = found["idle"]
    assert 0 < idle["busy"] < idle["span"]
    assert sum(gaps["total"] for gaps in idle["gaps"].values()) == pytest.approx(idle["span"] - idle["busy"])
    memory = found["memory"]
    assert memory["peak"] == pytest.approx(memory["told"], rel=0.01)
    assert memory["peak"] == pytest.approx(memory["allocator"], rel=0.01)
