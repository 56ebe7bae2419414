"""What a page tells of a run, as the object that it is drawn from: exact on lines of our choice, and bounded."""

import base64
import io
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image

from flowgrove.recipe.deciding import deciding
from flowgrove.recipe.loading import load_recipe
from flowgrove.recipe.schema import Reward
from flowgrove.report.content import run_content
from flowgrove.report.grids import load_grid
from flowgrove.report.page import report_page, write_report
from flowgrove.report.pictures import MOST_GRIDS, chosen_grids, pictures_of
from flowgrove.report.series import MOST_POINTS
from flowgrove.setup import Setup
from report_cases import LINE, grids_in, synthetic_run
from subprocesses import ROOT

TWO = [{"name": "shapes", "weight": 0.5}, {"name": "jpeg_size", "weight": -2.0}]


def run_of(tmp_path, lines, **changes):
    recipe = synthetic_run(tmp_path / "run", lines, **changes)
    return recipe, run_content(recipe, tmp_path / "run")


def test_curves_are_the_columns_of_the_lines(tmp_path):
    lines = [
        LINE
        | {
            "iteration": n, "ratio_min": 0.9 - n / 100, "clipped_low": n / 8, "skipped_updates": n % 2,
            "reward": {"shapes": {"mean": n / 4, "std": 0.5}, "jpeg_size": {"mean": 10.0 * n, "std": 3.0}},
            "seconds": {"rollout": 1.0 + n, "reward": 0.25}, "advantage_by_step": {str(n): 0.5, "9": 0.75},
        }
        for n in range(3)
    ]  # fmt: skip
    _, content = run_of(tmp_path, lines, reward=TWO)
    assert (content["iterations"], content["planned"], content["every"]) == (3, 3, 1)
    assert content["x"] == {"iteration": [0, 1, 2], "seconds": [0.0, 1.25, 3.5]}
    series = content["series"]
    assert series["reward"] == [0.0, 0.125 - 20, 0.25 - 40]
    assert series["ratio_min"] == [0.9, 0.89, 0.88]
    assert series["clipped_low"] == [0.0, 0.125, 0.25]
    assert series["skipped_updates"] == [0, 1, 0]
    assert series["dropped_prompts"] == [None] * 3
    assert content["rewards"][1] == {"name": "jpeg_size", "weight": -2.0, "mean": [0, 10, 20], "std": [3, 3, 3]}
    assert content["stages"] == {"rollout": [1, 2, 3], "reward": [0.25] * 3}
    assert content["advantage"] == {
        "steps": [0, 1, 2, 9],
        "values": [[0.5, None, None], [None, 0.5, None], [None, None, 0.5], [0.75] * 3],
    }
    facts = {name: value for name, value, _ in content["facts"]}
    assert facts["Time in stages"] == "6.8 s"
    assert facts["Iterations"] == "3 of 3"


def test_evaluations_come_with_their_intervals_and_the_time_before_them(tmp_path):
    told = {
        "eval_reward": 0.5,
        "eval_reward_confidence": 0.1,
        "eval_rewards": {"shapes": {"mean": 0.4, "confidence": 0.2}},
    }
    lines = [LINE | {"iteration": n} | (told if n in (0, 3) else {}) for n in range(4)]
    lines[3]["rollout_distance"] = 0.01
    assert run_of(tmp_path, lines, run={"iterations": 4})[1]["held_out"] == {
        "iteration": [0, 4], "seconds": [0.0, 6.0], "mean": [0.5, 0.5], "confidence": [0.1, 0.1],
        "distance": [None, 0.01],
        "rewards": [{"mean": [0.4, 0.4], "confidence": [0.2, 0.2]}],
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"credit": {"prune": {"kind": "depth", "first": 0, "depths": 1, "every": 2, "stop": 3}}},
        {"rollout": {"tree": {"splits": [0, 1], "fanout": 2}}, "update": {"updates_per_iteration": 1}},
    ],
)
def test_unshared_passes_are_those_of_the_plan_of_each_iteration(tmp_path, changes):
    recipe, content = run_of(tmp_path, [LINE | {"iteration": n} for n in range(9)], **changes)
    counts = [Setup(recipe).plan(n).counts for n in range(9)]
    assert content["unshared"] == {
        "rollout_forwards": [2 * each.unshared_rollout_forwards for each in counts],
        "train_passes": [2 * each.unshared_train_passes for each in counts],
    }
    saved = next(value for name, value, _ in content["facts"] if name == "Fewer rows than unshared")
    assert saved.startswith(f"{sum(2 * each.unshared_rollout_forwards for each in counts) / (9 * 20):.1f}×")


def test_a_label_that_came_later_finds_what_lines_told_under_the_name(tmp_path):
    recipe, content = run_of(tmp_path, [LINE], reward=[{"name": "shapes", "label": "places"}])
    assert content["iterations"] == 1
    assert content["rewards"] == [{"name": "places", "weight": 1.0, "mean": [0.5], "std": [0.1]}]
    unlabelled = recipe.model_copy(update={"reward": [Reward(name="shapes")]})
    assert Setup(recipe)._hash(deciding(recipe, True)) == Setup(recipe)._hash(deciding(unlabelled, True))


def test_a_run_of_one_expert_whose_model_has_gone_is_not_compared_with_the_unshared_loop(tmp_path):
    model = {"adapter": "wan", "path": str(tmp_path / "gone"), "trained_experts": "low"}
    _, content = run_of(tmp_path, [LINE], model=model)
    assert content["unshared"] is None
    assert "Rows" in {name for name, _, _ in content["facts"]}


def test_a_long_run_has_points_that_stand_for_several_iterations(tmp_path):
    count = 2 * MOST_POINTS + 100
    rng = np.random.default_rng(0)
    means, lows, highs = rng.random(count), 1 - rng.random(count), 1 + rng.random(count)
    lines = [
        LINE
        | {
            "iteration": n, "ratio_min": lows[n], "ratio_max": highs[n], "dropped_prompts": int(n % 4 == 0),
            "reward": {"shapes": {"mean": means[n], "std": 0.1}},
        }
        for n in range(count)
    ]  # fmt: skip
    _, content = run_of(tmp_path, lines)
    assert content["every"] == 3
    assert content["x"]["iteration"] == list(range(0, count, 3))
    whole = 3 * (count // 3)
    for key, values, how in (("reward", means, np.mean), ("ratio_min", lows, np.min), ("ratio_max", highs, np.max)):
        found = content["series"][key]
        assert found[: count // 3] == pytest.approx(how(values[:whole].reshape(-1, 3), axis=1), rel=1e-5)
        assert found[-1] == pytest.approx(how(values[whole:]), rel=1e-5)
    assert sum(content["series"]["dropped_prompts"]) == sum(line["dropped_prompts"] for line in lines)
    assert len(content["series"]["reward"]) <= MOST_POINTS


def test_the_recipe_tells_what_differs_from_the_defaults(tmp_path):
    recipe, content = run_of(tmp_path, [LINE], update={"lr": 3e-4}, reward=TWO)
    changed = {key: (value, default) for key, value, default in content["recipe"]["changed"]}
    assert changed["update.lr"] == ("0.0003", "1e-5")
    assert changed["model.adapter"] == ("sd3", "")
    assert changed["reward.1.weight"] == ("-2.0", "1.0")
    assert changed["rollout.window.size"][0] == "2"
    assert "update.optimizer" not in changed
    settings = content["recipe"]["settings"]
    assert settings["update.optimizer"] == "adamw"
    assert set(changed) <= set(settings)
    assert all(settings[key] == value for key, (value, _) in changed.items())
    assert content["recipe"]["yaml"] == (tmp_path / "run" / "recipe.yaml").read_text()
    assert recipe.update.lr == 3e-4


def test_what_json_and_utf8_lack_is_left_out(tmp_path):
    lines = [LINE | {"iteration": n, "grad_norm": math.inf, "approx_kl": math.nan} for n in range(2)]
    recipe = synthetic_run(tmp_path / "run", lines)
    (tmp_path / "run").rename(tmp_path / "run\udce9")
    content = run_content(recipe, tmp_path / "run\udce9")
    assert content["name"] == "run?"
    assert content["series"]["grad_norm"] == content["series"]["approx_kl"] == [None, None]
    json.dumps(content, allow_nan=False)
    report_page([content], "run\udce9").encode("utf-8")


def test_a_run_folder_of_an_earlier_version_has_a_page(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "old_run", tmp_path / "old")
    folder = tmp_path / "old" / "run"
    recipe = load_recipe(folder / "recipe.yaml")
    assert write_report(recipe, folder) == folder / "report.html"
    content = run_content(recipe, folder)
    assert content["iterations"] == 2
    assert content["held_out"]["mean"] == []


def test_lines_without_intervals_have_evaluations_without_them(tmp_path):
    _, content = run_of(tmp_path, [LINE | {"iteration": n, "eval_reward": n / 2} for n in range(2)])
    assert content["held_out"]["confidence"] == [None, None]
    assert content["held_out"]["rewards"] == [{"mean": [None, None], "confidence": [None, None]}]


def test_a_run_without_a_line_has_content_already(tmp_path):
    _, content = run_of(tmp_path, [])
    assert content["iterations"] == 0
    assert content["facts"] == content["findings"] == content["x"]["iteration"] == []


# Pictures


def picture_in(grid):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(grid["src"].partition(",")[2]))).convert("RGB"))


def test_small_tiles_are_kept_to_the_bit_with_prompts_and_scores(tmp_path):
    grids_in(tmp_path, (0, ["a <b>", "c"], 3), (7, ["a <b>", "c"], 3))
    found = pictures_of(tmp_path)
    assert found["common"] == [(0, 0), (1, 1)]
    for done, told in zip((0, 7), found["grids"], strict=True):
        grid = load_grid(tmp_path / "samples" / f"iteration_{done:06d}.png")
        assert {key: told[key] for key in ("done", "rows", "columns", "width", "height", "prompts")} == {
            "done": done, "rows": 2, "columns": 3, "width": 12, "height": 8, "prompts": ["a <b>", "c"],
        }  # fmt: skip
        assert np.array_equal(
            picture_in(told), np.asarray(Image.open(tmp_path / "samples" / f"iteration_{done:06d}.png"))
        )
        assert np.allclose(told["scores"], grid.scores, rtol=1e-5)


def test_of_many_grids_the_first_the_last_and_some_between_are_kept(tmp_path):
    grids_in(tmp_path, *((n, ["a"], 1) for n in range(0, 600, 10)))
    done = [number for number, _ in chosen_grids(tmp_path)]
    assert len(done) == MOST_GRIDS
    assert (done[0], done[-1]) == (0, 590)
    gaps = np.diff(done)
    assert gaps.min() >= 10
    assert gaps.max() <= 40
    assert [number for number, _ in chosen_grids(tmp_path, 2)] == [0, 590]


def test_pictures_take_no_more_than_they_may_and_stay_as_large_as_they_can(tmp_path):
    """Noise hardly compresses; the less room, the smaller the tiles, and neighbours do not run into each other."""
    grids_in(tmp_path, (0, ["a", "b"], 2), (5, ["a", "b"], 2), size=(160, 256))
    widths = []
    for most in (2_000_000, 150_000, 30_000):
        grids = pictures_of(tmp_path, most_bytes=most)["grids"]
        assert sum(len(grid["src"]) for grid in grids) <= most * 4 / 3 + 200
        widths.append(picture_in(grids[0]).shape[1] // 2)
    assert widths[0] == 256
    assert widths[0] > widths[1] > widths[2] >= 48


def test_an_address_can_stand_for_a_picture(tmp_path):
    grids_in(tmp_path, (3, ["a"], 1))
    (grid,) = pictures_of(tmp_path, lambda done, picture, kind: f"/{done}.{kind}?{len(picture) > 50}")["grids"]
    assert grid["src"] == "/3.png?True"
