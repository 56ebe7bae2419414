"""flowgrove bench engine: passes are those of MATH §5, ratios are of one table, and the numbers of a lever come from that lever."""

import csv
import json

import pytest

from engine_cases import refuse, succeed
from flowgrove.bench.engine import COLUMNS, LEVERS, RECIPES, bench_prompts, bench_recipe
from flowgrove.bench.models import write_flux
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.rewards.registry import Rewards
from flowgrove.update import Updater
from policy_cases import CPU

# rollout forwards and train passes per prompt: every trajectory and edge for itself, and shared (MATH §5, T = 20, 16 leaves, one update)
COUNTS = {
    "dance": ((320, 304), (1 + 16 * 19, 1 + 16 * 18)),
    "mix": ((320, 64), (1 + 16 * 19, 1 + 16 * 3)),
    "mix_flash": ((160, 64), (1 + 16 * 9, 1 + 16 * 3)),
    "branch": ((320, 202), (203, 187)),
    "branch_mix": ((320, 34), (203, 19)),
    "branch_mix_flash": ((224, 34), (107, 19)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    told = succeed("bench", "engine", "--recipes", "branch_mix_flash", "--prompts", "1", "--rounds", "1", "--device", "cpu", "--json", "--out", folder)
    return json.loads(told.stdout), folder


def test_every_lever_has_a_row_with_its_counted_passes(measured):
    rows, _ = measured
    assert [row["lever"] for row in rows] == [lever.name for lever in LEVERS]
    alone, shared = COUNTS["branch_mix_flash"]
    assert [(row["rollout_forwards"], row["train_passes"]) for row in rows] == [alone] * 3 + [shared] * 2


def test_ratios_are_against_the_published_loop_of_the_same_run(measured):
    rows, _ = measured
    for row in rows:
        assert row["speedup"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
        assert row["predicted_speedup"] == pytest.approx(rows[0]["predicted_s"] / row["predicted_s"])
        assert 0 < row["transformer_s"] < row["seconds"]
        assert row["percent_outside"] == pytest.approx(100 * (1 - row["transformer_s"] / row["seconds"]))
        stages = sum(row[f"{stage}_s"] for stage in ("plan", "rollout", "reward", "credit", "update"))
        assert stages == pytest.approx(row["seconds"])


def test_csv_and_plot_are_written(measured):
    rows, folder = measured
    with (folder / "engine_tiny_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [float(line["speedup"]) for line in lines] == [row["speedup"] for row in rows]
    assert (folder / "engine_tiny_cpu.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_passes_of_every_recipe(name):
    told = succeed("bench", "engine", "--recipes", name, "--prompts", "1", "--rounds", "1", "--device", "cpu", "--json")
    alone, shared = COUNTS[name]
    assert [(row["rollout_forwards"], row["train_passes"]) for row in json.loads(told.stdout)] == [alone] * 3 + [shared] * 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(("--recipes", "nothing"), "--recipes names nothing"), (("--model", "huge"), "--model is huge"), (("--model", "flux"), "wants a GPU")],
)
def test_unknown_names_are_refused(arguments, text):
    assert text in refuse("bench", "engine", "--device", "cpu", *arguments)


def test_flux_with_random_weights_is_a_pipeline_that_trains(tmp_path):
    """Its architecture at a size for a CPU."""
    changes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 128, "joint_attention_dim": 64}
    write_flux(tmp_path / "pipeline", changes, CPU)
    model = {"adapter": "flux", "path": str(tmp_path / "pipeline"), "dtype": "bf16", "height": 32, "width": 32, "lora": {"rank": 2, "alpha": 4}}
    recipe = bench_recipe(model, 1, {"group_size": 16, **RECIPES["branch_mix_flash"]}, {"device": "cpu"})
    policy = Policy(recipe, CPU)
    line = Stages(recipe, policy, Updater(recipe, policy), Rewards(recipe, CPU)).run(bench_prompts(1), 0)
    assert (line["rollout_forwards"], line["train_passes"]) == COUNTS["branch_mix_flash"][1]
    assert line["grad_norm"] > 0
