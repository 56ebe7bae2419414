"""flowgrove bench engine: passes are those of MATH §5, ratios are of one table,
and the numbers of a lever come from that lever.
"""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench_models import small_qwen
from engine_cases import refuse, succeed
from flowgrove.bench import engine, engine_plot
from flowgrove.bench.engine import (
    COLUMNS,
    LEVERS,
    LOOP,
    PUBLISHED,
    REUSED,
    compare,
)
from flowgrove.bench.models import write_flux
from flowgrove.bench.recipes import RECIPES, bench_prompts, bench_recipe, bench_rewards
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.tuning.graph_room import GraphRoom
from flowgrove.update.updater import Updater
from policy_cases import CPU, runner_of

# per prompt (MATH §5, T = 20, 16 leaves, one update), rollout forwards and train passes: of the published loop, of that
# in full batches, and with every state computed once
_DRAWN = 2  # where flow_fast's window begins in iteration 0
COUNTS = {
    "dance": ((320, 304), (320, 304), (1 + 16 * 19, 1 + 16 * 18)),
    "flow": ((320, 304), (320, 304), (320, 304)),
    "flow_fast": ((320, 48), (320, 48), (_DRAWN + 1 + 16 * (19 - _DRAWN), 1 + 16 * 2)),
    "mix": ((320, 64), (320, 64), (1 + 16 * 19, 1 + 16 * 3)),
    "mix_flash": ((160, 64), (160, 64), (1 + 16 * 9, 1 + 16 * 3)),
    "branch": ((203, 202), (203, 202), (203, 187)),
    "branch_mix": ((203, 34), (203, 34), (203, 19)),
    "branch_mix_flash": ((107, 34), (107, 34), (107, 19)),
    "grove": ((117, 20), (117, 20), (117, 5)),
}
ENGINE = ("bench", "engine", "--prompts", "1", "--rounds", "1", "--device", "cpu", "--json")


def bench(*arguments):
    return json.loads(succeed(*ENGINE, *arguments).stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return bench("--recipes", "branch_mix_flash", "--out", folder), folder


def counts(rows):
    return [(row["rollout_forwards"], row["train_passes"]) for row in rows]


def cost(row, last):
    return row["rollout_forwards"] * last["row_forward_s"] + row["train_passes"] * last["row_train_s"]


def test_every_lever_has_a_row_with_its_counted_passes(measured):
    """BranchGRPO's own rollout shares states, its training does not."""
    rows, _ = measured
    assert [row["lever"] for row in rows] == [lever.name for lever in LEVERS]
    published, full, shared = COUNTS["branch_mix_flash"]
    assert counts(rows) == [published, published, full, shared, shared]
    assert [row["rows_per_pass"] for row in rows] == [1, 1, 16, 16, 16]


def test_ratios_are_against_the_published_loop_of_the_same_run(measured):
    rows, _ = measured
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
        assert row["predicted_speedup"] == pytest.approx(rows[0]["predicted_s"] / row["predicted_s"])
        assert 0 < row["transformer_s"] < row["seconds"]
        assert row["percent_outside"] == pytest.approx(100 * (1 - row["transformer_s"] / row["seconds"]))
        stages = sum(row[f"{stage}_s"] for stage in ("plan", "rollout", "reward", "credit", "update"))
        assert stages == pytest.approx(row["seconds"])


def test_the_speed_up_is_fewer_rows_times_cheaper_rows(measured):
    """Rows are weighed with what one costs in passes of the last lever, alike on both sides."""
    rows, _ = measured
    for row in rows:
        assert row["rows_speedup"] == pytest.approx(cost(rows[0], rows[-1]) / cost(row, rows[-1]))
        assert row["rows_speedup"] * row["per_row_speedup"] == pytest.approx(row["speedup"])
        assert row["predicted_s"] == pytest.approx(cost(row, row))
    assert [row["rows_speedup"] for row in rows[:3]] == [1, 1, 1]
    assert 1 < rows[-1]["rows_speedup"] < 34 / 19
    assert [row["over_dance"] for row in rows] == [row["rows_over_dance"] for row in rows] == [None] * len(rows)


def test_csv_and_plot_are_written(measured):
    rows, folder = measured
    with (folder / "engine_tiny_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [float(line["speedup"]) for line in lines] == [row["speedup"] for row in rows]
    assert {line["over_dance"] for line in lines} == {""}
    assert (folder / "engine_tiny_cpu.png").stat().st_size > 10_000


def test_levers_of_choice_and_a_loop_that_was_not_run(tmp_path):
    """What has no published loop of its own has no speed-up, but counted rows."""
    recipes = "branch_mix_flash,mix_flash:ours,flow_fast:published"
    rows = bench("--recipes", recipes, "--levers", "ends", "--out", tmp_path)
    ends, ours, published = rows[:2], rows[2], rows[3]
    assert [row["lever"] for row in rows] == [LOOP.name, REUSED.name, REUSED.name, LOOP.name]
    assert [row["rows_per_pass"] for row in rows] == [1, 16, 16, 8]
    assert ends[1]["speedup"] == pytest.approx(ends[0]["seconds"] / ends[1]["seconds"])
    assert ours["speedup"] is ours["per_row_speedup"] is ours["predicted_speedup"] is None
    planned = dict(zip(("rollout_forwards", "train_passes"), COUNTS["mix_flash"][0], strict=True))
    assert ours["rows_speedup"] == pytest.approx(cost(planned, ours) / cost(ours, ours))
    assert published["speedup"] == published["rows_speedup"] == 1
    with (tmp_path / "engine_tiny_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["speedup"] == "" for line in lines] == [False, False, True, False]
    assert (tmp_path / "engine_tiny_cpu.png").stat().st_size > 10_000


def test_checkpoints_are_levers_before_ours(monkeypatch):
    """Rows are weighed by ours, which computes nothing again."""
    kinds = []
    monkeypatch.setattr(engine, "checkpoint_blocks", lambda transformer, kind, mode: kinds.append(kind))
    rows = bench("--recipes", "mix_flash", "--levers", "ours", "--checkpointing")
    assert [row["lever"] for row in rows] == [*(lever.name for lever in engine.CHECKPOINTED), REUSED.name]
    assert len({(row["rollout_forwards"], row["train_passes"]) for row in rows}) == 1
    assert kinds[-3:] == ["full", "selective", "none"]


def test_all_recipes_are_compared_with_the_published_dance():
    def row(recipe, lever, forwards, passes, seconds, forward=1.0, train=4.0):
        times = {"seconds": seconds, "predicted_s": seconds, "row_forward_s": forward, "row_train_s": train}
        return {"recipe": recipe, "lever": lever, "rollout_forwards": forwards, "train_passes": passes, **times}

    rows = [row("mix", REUSED.name, 305, 49, 5.0, forward=2.0, train=6.0), row("dance", LOOP.name, 320, 304, 80.0)]
    compare(rows, {name: COUNTS[name][0] for name in ("mix", "dance")})
    assert [each["over_dance"] for each in rows] == [16, 1]
    assert [each["rows_over_dance"] for each in rows] == [pytest.approx((320 * 2 + 304 * 6) / (305 * 2 + 49 * 6)), 1]
    assert rows[0]["rows_speedup"] == pytest.approx((320 * 2 + 64 * 6) / (305 * 2 + 49 * 6))


def batches_of(lever, name):
    """Rows of the transformer's passes in an iteration of one prompt: (without, with gradient)."""
    model = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False}
    recipe = bench_recipe(model, 1, {"group_size": 16, **RECIPES[name]}, {"device": "cpu"})
    policy, texts = Policy.load(recipe, CPU), bench_prompts(1)
    runner, seen = PassRunner.of(recipe, policy), ([], [])
    lever.set_budget(PUBLISHED[name], policy, runner.budget, texts, 4096)
    stages = lever.stages(recipe, PUBLISHED[name], policy, runner, bench_rewards(recipe, CPU))

    def watch(_, inputs, output):
        seen[torch.is_grad_enabled()].append(len(output[0]))

    policy.transformer.register_forward_hook(watch)
    stages.run(texts, 0)
    return seen


def test_flow_grpo_runs_eight_rows_a_pass():
    assert batches_of(LOOP, "flow") == ([8] * 40, [8] * 38)


def test_branch_grpo_runs_a_row_a_pass_of_shared_states_and_of_every_edge():
    assert batches_of(LOOP, "branch_mix_flash") == ([1] * 107, [1] * 34)


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_passes_of_every_recipe(name):
    published, full, shared = COUNTS[name]
    assert counts(bench("--recipes", name)) == [published, published, full, shared, shared]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--recipes", "nothing"), "--recipes names nothing"),
        (("--recipes", "mix,mix:ours"), "--recipes names mix twice"),
        (("--recipes", "mix:half"), "mix:half: write one of all, ends, published, ours"),
        (("--levers", "half"), "--levers is half: write one of all, ends, published, ours"),
        (("--model", "huge"), "--model is huge"),
        (("--model", "flux"), "wants a GPU"),
    ],
)
def test_unknown_names_are_refused(arguments, text):
    assert text in refuse("bench", "engine", "--device", "cpu", *arguments)


def test_pictures_of_one_file_size_have_different_scores():
    """Else which edges train, and so what is measured, would hang on how a machine rounds."""
    recipe = bench_recipe({"adapter": "sd3", "path": "tiny"}, 1, RECIPES["mix"], {"device": "cpu"})
    pictures, texts = torch.linspace(0.5, 0.5 + 1e-4, 5).view(5, 1, 1, 1).expand(5, 3, 32, 32), bench_prompts(5)
    assert len(Rewards(recipe, CPU)(pictures, texts).unique()) == 1
    assert bench_rewards(recipe, CPU)(pictures, texts).diff(dim=0).min() > 1e-5  # more than what counts as alike


@pytest.mark.long
def test_flux_with_random_weights_is_a_pipeline_that_trains(tmp_path):
    """Its architecture at a size for a CPU."""
    changes = {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 128,
        "joint_attention_dim": 64,
    }
    write_flux(tmp_path / "pipeline", changes, CPU)
    model = {
        "adapter": "flux",
        "path": str(tmp_path / "pipeline"),
        "dtype": "bf16",
        "height": 32,
        "width": 32,
        "lora": {"rank": 2, "alpha": 4},
    }
    recipe = bench_recipe(model, 1, {"group_size": 16, **RECIPES["branch_mix_flash"]}, {"device": "cpu"})
    policy = Policy.load(recipe, CPU)
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    line = Stages(Setup(recipe), policy, updater, bench_rewards(recipe, CPU)).run(bench_prompts(1), 0)
    assert (line["rollout_forwards"], line["train_passes"]) == COUNTS["branch_mix_flash"][2]
    assert line["grad_norm"] > 0


def test_what_was_measured_stays_if_a_later_recipe_is_stopped(monkeypatch, tmp_path):
    measure = engine._Bench.recipe

    def stopped(self, name, choice):
        if name == "mix":
            raise KeyboardInterrupt
        return measure(self, name, choice)

    monkeypatch.setattr(engine._Bench, "recipe", stopped)
    settings = engine.settings_of("tiny", "branch_mix_flash:ours,mix:ours", "all", 1, 1, False, "cpu")
    with pytest.raises(KeyboardInterrupt):
        engine.bench_engine(settings, lambda line: None, tmp_path)
    with (tmp_path / "engine_tiny_cpu.csv").open(encoding="utf-8") as file:
        assert [row["recipe"] for row in csv.DictReader(file)] == ["branch_mix_flash"]


def test_rollouts_in_8_bits_are_a_lever():
    """Of one plan with the lever before it: the same rows, most forwards of which are cheap."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    rows = bench("--recipes", "mix_flash", "--levers", "ours", "--precision", "int8")
    assert [row["lever"] for row in rows] == ["+ reused graphs", "+ int8 rollouts"]
    assert [(row["rollout_forwards"], row["train_passes"]) for row in rows] == [COUNTS["mix_flash"][2]] * 2
    assert rows[0]["rows_speedup"] == rows[1]["rows_speedup"]


@pytest.mark.long
def test_masked_texts_and_another_attention_are_levers(tmp_path, monkeypatch):
    """Where a model masks texts, rows of one length run apart without it, and so does an attention that may take none.
    Nothing else changes: the rows and passes are those of the lever before.
    """
    model, unmasked, told = small_qwen(tmp_path / "pipeline", text_tokens=64), [], []
    inner = Policy._velocity_by_lengths
    monkeypatch.setattr(engine, "bench_model", lambda *_: nullcontext(model))
    monkeypatch.setattr(engine, "LEVERS", (REUSED,))
    monkeypatch.setattr(
        Policy,
        "_velocity_by_lengths",
        lambda self, x, sigma, cond, lengths: (
            unmasked.append(len(np.unique(lengths))) or inner(self, x, sigma, cond, lengths)
        ),
    )
    settings = engine.settings_of("tiny", "mix_flash", "all", 2, 1, False, "cpu", attention="_native_math")
    rows = engine.bench_engine(settings, told.append, tmp_path / "out")
    assert [row["lever"] for row in rows] == [REUSED.name, "+ split lengths", "+ _native_math rollouts"]
    assert len(set(counts(rows))) == 1
    assert len(unmasked) > 20
    assert max(unmasked) == 2, "prompts of two lengths"
    assert all(row["row_train_s"] > row["row_forward_s"] > 0 for row in rows)


@pytest.mark.parametrize(("attention", "split"), [("_native_math", {}), ("flash", {"split_lengths": True})])
def test_cheap_levers_are_measured_alone_and_together(attention, split):
    """Without masks where their attention takes none; every lever has a colour."""
    settings = engine.settings_of("tiny", "mix", "all", 1, 1, True, "cpu", "int8", True, attention)
    levers = {lever.name: lever.engine for lever in replace(settings, device=torch.device("cuda")).levers("all", True)}
    assert [(name, levers[name]) for name in list(levers)[-3:]] == [
        ("+ int8 rollouts", {"compile": True}),
        (f"+ {attention} rollouts", {"compile": True, **split}),
        (f"+ int8 {attention} rollouts", {"compile": True, **split}),
    ]
    assert len(set(engine_plot._COLOURS)) == len(engine_plot._COLOURS) == len(levers)
    assert "+ split lengths" not in [lever.name for lever in settings.levers("all")]


def test_an_attention_that_cannot_run_here_is_refused():
    assert "--attention is flash" in refuse("bench", "engine", "--device", "cpu", "--attention", "flash")


def test_the_lever_runs_its_untrained_steps_in_8_bits(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    cheap = []
    quantised = Policy.cheap
    monkeypatch.setattr(Policy, "cheap", lambda policy: cheap.append(1) or quantised(policy))
    settings = engine.settings_of("tiny", "mix_flash:ours", "all", 1, 1, False, "cpu", "int8")
    bench = engine._Bench({"adapter": "sd3", "path": "tiny", "dtype": "fp32"}, settings, lambda _: None)
    lever = engine.Lever.cheap("int8", None, {})
    stages = lever.stages(bench._recipe("mix_flash"), PUBLISHED["mix_flash"], bench.policy, bench.runner, bench.rewards)
    assert cheap == []
    with bench._ready(lever, PUBLISHED["mix_flash"], stages):
        stages.run(bench.texts, 0)
    assert len(cheap) == 10 - 4  # steps of the plan without its window


def test_the_room_for_graphs_is_settled_once_and_in_no_iteration(monkeypatch):
    """Predicting it takes seconds on a large model, which would count as a rollout's."""
    seen = []
    of, run = GraphRoom.of.__func__, Stages.run
    monkeypatch.setattr(GraphRoom, "of", classmethod(lambda cls, *given: seen.append("room") or of(cls, *given)))
    monkeypatch.setattr(Stages, "run", lambda *given: seen.append("iteration") or run(*given))
    settings = engine.settings_of("tiny", "branch_mix_flash:ours,mix_flash:ours", "all", 1, 2, False, "cpu")
    engine.bench_engine(settings, lambda line: None)
    short, first, second = ["iteration"], ["room", *["iteration"] * 3], ["room", *["iteration"] * 2]  # one warms up
    assert seen == [*short, *first, *second]
