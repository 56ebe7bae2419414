"""flowgrove bench scaling: counts are those of the plan, the overhead of a row comes from that row,
and the exponent is 1 where cost is linear.
"""

import csv
import json

import pytest
import torch

from engine_cases import refuse, succeed
from flowgrove.bench.scaling import COLUMNS, PROMPTS, Point, point_recipe
from flowgrove.bench.scaling_fit import exponent, upper_half
from flowgrove.plan.planner import make_plan

# leaves → distinct states that the rollout runs, states that train, nodes of the forest, per prompt. Splits at 0, 3, 6,
# 9 of 20 steps, window 0 … 3. A lone trajectory has no advantage; 6 leaves are three trees of 2.
BRANCHES = {1: (20, 0, 21), 2: (1 + 2 * 19, 1 + 2 * 3, 1 + 2 * 20), 6: (3 * 39, 3 * 7, 3 * 41), 16: (203, 19, 203 + 16)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    told = succeed(
        "bench", "scaling", "--leaves", "1,2,6", "--prompts", "1,2,3", "--rounds", "1", "--device", "cpu", "--json",
        "--out", folder,
    )  # fmt: skip
    return json.loads(told.stdout), folder


def test_counts_are_the_plans_times_prompts(measured):
    rows, _ = measured
    assert [(row["sweep"], row["leaves"], row["prompts"]) for row in rows] == [
        *(("leaves", leaves, PROMPTS) for leaves in (1, 2, 6)),
        *(("prompts", 16, prompts) for prompts in (1, 2, 3)),
    ]
    for row in rows:
        counted = row["rollout_forwards"], row["train_passes"], row["nodes"]
        assert counted == tuple(count * row["prompts"] for count in BRANCHES[row["leaves"]])
        assert row["forward_equivalents"] == row["rollout_forwards"] + 3 * row["train_passes"]


@pytest.mark.parametrize("leaves", [16, 32, 64, 128, 256])
def test_counts_are_in_proportion_to_leaves_from_16_on(leaves):
    counts = make_plan(
        point_recipe({"adapter": "sd3", "path": "tiny"}, Point("leaves", leaves, PROMPTS), torch.device("cpu")), 0
    ).counts
    assert (counts.leaves, counts.rollout_forwards, counts.train_passes) == (
        leaves,
        203 * leaves // 16,
        19 * leaves // 16,
    )


def test_overhead_is_what_a_row_spends_outside_transformer_and_reward(measured):
    rows, _ = measured
    for row in rows:
        stages = {stage: row[f"{stage}_s"] for stage in ("plan", "rollout", "reward", "credit", "update")}
        assert row["seconds"] == pytest.approx(sum(stages.values()))
        assert row["outside_s"] == pytest.approx(row["seconds"] - row["reward_s"] - row["transformer_s"])
        assert row["outside_us_per_node"] == pytest.approx(1e6 * row["outside_s"] / row["nodes"])
        assert 0 < row["outside_s"] < row["seconds"]


def test_rows_hold_the_exponent_of_their_sweep(measured):
    rows, _ = measured
    for sweep in ("leaves", "prompts"):
        members = [row for row in rows if row["sweep"] == sweep]
        assert {row["exponent"] for row in members} == {exponent(members)}


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_is_the_power_of_the_upper_half(power):
    rows = [{"forward_equivalents": 100 * 2**k, "seconds": 1.0 if k < 4 else (3 * 2**k) ** power} for k in range(9)]
    assert exponent(rows) == pytest.approx(power)


@pytest.mark.parametrize(("points", "kept"), [(3, 2), (4, 2), (7, 4), (9, 5)])
def test_upper_half_keeps_the_middle_point(points, kept):
    assert upper_half([{"leaves": k} for k in range(points)]) == [{"leaves": k} for k in range(points - kept, points)]


def test_csv_and_plot_are_written(measured):
    rows, folder = measured
    with (folder / "scaling_tiny_cpu.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    for key in ("seconds", "outside_us_per_node", "exponent"):
        assert [float(line[key]) for line in lines] == [row[key] for row in rows]
    assert (folder / "scaling_tiny_cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", ["--leaves", "--prompts"])
@pytest.mark.parametrize("counts", ["", "1,2", "1,2,x", "0,1,2", "1,-2,4", "4,2,1", "1,2,2,4", "1,2.5,4"])
def test_counts_that_do_not_rise_from_1_are_refused(option, counts):
    assert refuse("bench", "scaling", "--device", "cpu", option, counts) == (
        f"error: {option} is {counts!r}: write at least three rising whole numbers from 1 up, like 1,2,4"
    )


@pytest.mark.parametrize(
    ("arguments", "text"), [(("--model", "huge"), "--model is huge"), (("--device", "tpu"), "--device is 'tpu'")]
)
def test_unknown_names_are_refused(arguments, text):
    assert text in refuse("bench", "scaling", *arguments)
