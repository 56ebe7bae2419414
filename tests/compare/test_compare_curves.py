"""Rewards at equal cost, the best learning rate of each recipe, and how they are drawn."""

import csv
import io
import itertools
import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from engine_cases import tiny_recipe
from flowgrove.compare.curves import Curve, Point, Search, best_rates, curve_of, points_of, summarise
from flowgrove.compare.picture import draw_curves, over_seeds, spaced
from flowgrove.compare.runs import Run
from flowgrove.compare.tables import draw_comparison, notes, write_tables
from flowgrove.recipe.loading import dump_recipe, load_recipe
from flowgrove.setup import Setup


def curve(recipe, lr, seed, *points, done=True, unscored=False):
    """Points: (passes, reward); an iteration costs 100 passes and 2 seconds."""
    return Curve(recipe, lr, seed, [Point(p // 100, p, p / 50, r, r - 0.1) for p, r in points], done, unscored)


SMALL, LARGE = 1e-4, 3e-4
CURVES = [
    curve("a", SMALL, 1, (0, 0.5), (400, 0.6), (800, 0.8)),
    curve("a", SMALL, 2, (0, 0.4), (400, 0.7), (800, 0.7)),
    curve("a", LARGE, 1, (0, 0.5), (400, 0.9), (800, 0.5)),
    curve("a", LARGE, 2, (0, 0.4), (400, 0.8), (800, 0.7)),
    curve("b", SMALL, 1, (0, 0.5), (1000, 0.9)),
    curve("b", SMALL, 2, (0, 0.4), (1000, 0.8)),
    curve("b", LARGE, 1, (0, 0.5), (1000, 1.0)),
    curve("b", LARGE, 2, (0, 0.4), (500, 0.9), done=False),
]


def test_rewards_are_read_between_evaluations_on_the_line():
    """By hand: at 600 passes a is half way between 400 and 800, b six tenths of the way to 1000."""
    found = {one.recipe: one for one in summarise(CURVES, "weighted_passes", [600])}
    assert found["a"].lr == LARGE
    assert found["a"].rewards == pytest.approx((0.7, 0.75))
    assert found["a"].mean == pytest.approx(0.725)
    assert found["a"].std == pytest.approx(statistics.stdev([0.7, 0.75]))
    assert found["a"].tried == (SMALL, LARGE)
    assert found["a"].before == pytest.approx(0.45)
    assert (found["a"].iterations, found["a"].seconds, found["a"].weighted_passes) == pytest.approx((6, 12, 600))
    assert found["b"].lr == SMALL, "the other has not come so far with seed 2, however good it is"
    assert found["b"].rewards == pytest.approx((0.5 + 0.6 * 0.4, 0.4 + 0.6 * 0.4))
    assert found["b"].untried == (LARGE,)


def test_each_cost_has_its_own_best_learning_rate_and_order():
    found = summarise(CURVES, "weighted_passes", [400, 800])
    assert [(one.cost, one.recipe, one.lr) for one in found] == [
        (400, "a", LARGE),
        (400, "b", LARGE),
        (800, "b", SMALL),
        (800, "a", SMALL),
    ]
    assert [one.at_the_edge for one in found] == ["largest", "largest", None, "smallest"]


def test_a_search_chooses_by_the_first_seed_alone():
    """At 400 passes seed 1 likes LARGE of both; b has it on one seed only, and says nothing of itself at 800."""
    assert best_rates(CURVES, "weighted_passes", 400) == {"a": LARGE, "b": LARGE}
    (found,) = summarise(CURVES, "weighted_passes", [800], Search(400, {"a": LARGE, "b": LARGE}))
    assert (found.recipe, found.lr, found.rewards) == ("a", LARGE, (0.5, 0.7))
    assert (found.tried, found.untried, found.at_the_edge) == ((SMALL, LARGE), (), "largest")


def test_seconds_are_a_cost_too():
    found = summarise(CURVES, "seconds", [8])
    assert [one.recipe for one in found] == ["a", "b"]
    assert found[0].rewards == pytest.approx((0.9, 0.8))
    assert found[0].weighted_passes == pytest.approx(400)


def test_without_a_cost_it_is_what_all_runs_that_are_done_have_spent():
    assert {one.cost for one in summarise(CURVES, "weighted_passes", [])} == {800}
    assert summarise([curve("a", SMALL, 1, (0, 0.5), done=False)], "weighted_passes", []) == []


def test_beyond_the_last_evaluation_nothing_is_known():
    assert summarise(CURVES, "weighted_passes", [1100]) == []
    one = CURVES[0]
    assert (one.at(800), one.at(801), one.at(0)) == (0.8, None, 0.5)
    assert one.at(600, key="training_reward") == pytest.approx(0.6)


def test_points_tell_what_the_lines_add_up_to(tmp_path):
    """The evaluation of a line comes before its iteration, the last one after all."""
    recipe = load_recipe(tiny_recipe(tmp_path, run={"iterations": 5}))
    lines = [
        {"iteration": i, "rollout_forwards": 10 + i, "train_passes": i, "seconds": {"rollout": 1.0, "update": 0.5},
         "reward": {"shapes": {"mean": 0.1 * i, "std": 0.1}}}
        for i in range(5)
    ]  # fmt: skip
    lines[0]["eval_reward"], lines[2]["eval_reward"], lines[4]["eval_reward"] = 0.3, 0.4, 0.6
    points = points_of(recipe, lines)
    assert points == [
        pytest.approx(Point(0, 0, 0, 0.3, 0.0)),
        pytest.approx(Point(2, 10 + 11 + 3, 3.0, 0.4, 0.05)),
        pytest.approx(Point(5, 60 + 30, 7.5, 0.6, 0.3)),
    ]
    assert points_of(recipe, lines[:3])[-1].iteration == 2, "a run that is not done has no last evaluation"


def test_a_run_whose_last_evaluation_has_no_reward_has_not_stayed_behind(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path, run={"iterations": 2}))
    told = {"rollout_forwards": 10, "train_passes": 1, "seconds": {"rollout": 1.0}, "peak_memory_bytes": 1,
            "reward": {"shapes": {"mean": 0.1, "std": 0.1}},
            **dict.fromkeys(("ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high"))}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for last, unscored in ((None, True), (0.5, False)):
        lines = [{**told, "iteration": 0, "eval_reward": 0.3}, {**told, "iteration": 1, "eval_reward": last}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
        found = curve_of(Run("a", SMALL, 1, Setup(recipe), tmp_path))
        assert (found.unscored, found.done) == (unscored, not unscored)
    one, other = curve("a", SMALL, 1, (0, 0.5), (800, 0.8)), curve("a", LARGE, 1, (0, 0.5), done=False, unscored=True)
    note = next(note for note in notes(summarise([one, other], "weighted_passes", [800])) if "0.0003" in note)
    assert "their last evaluation could not be scored" in note
    assert "have not come so far" not in note


def test_bands_reach_from_the_worst_to_the_best_seed():
    costs, mean, lowest, highest = over_seeds(CURVES[:2], "weighted_passes", 600)
    assert (costs[0], costs[-1]) == (0, 600)
    assert (lowest[-1], mean[-1], highest[-1]) == pytest.approx((0.7, 0.7, 0.7))
    assert (lowest[0], mean[0], highest[0]) == pytest.approx((0.4, 0.45, 0.5))
    costs, *_ = over_seeds([CURVES[0], CURVES[7]], "seconds", 1e9)
    assert costs[-1] == 10, "where one of them ends"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted))
def test_labels_never_overlap_and_stay_inside(wanted):
    places = spaced(wanted, 0.05)
    assert len(places) == len(wanted)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 1 + 1e-9
    if all(b - a >= 0.05 for a, b in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted)


@pytest.mark.parametrize("count", [1, 10])
def test_a_picture_shows_every_recipe_in_a_colour_or_dash_of_its_own(count, tmp_path):
    curves = [
        curve(f"recipe_{number}", SMALL, seed, (0, 0.5), (500, 0.6 + number / 30 + seed / 100))
        for number in range(count)
        for seed in (1, 2)
    ]
    draw_curves(curves, summarise(curves, "weighted_passes", [500]), tmp_path / "x.png")
    pixels = np.array(Image.open(tmp_path / "x.png").convert("RGB"))
    assert pixels.std() > 10
    blue = (pixels == (0x00, 0x72, 0xB2)).all(-1).sum()
    orange = (pixels == (0xD5, 0x5E, 0x00)).all(-1).sum()
    assert blue > 100
    assert (orange > 100) == (count > 1)


def test_tables_say_what_was_found_and_how_it_was_chosen(tmp_path):
    found = summarise(CURVES, "weighted_passes", [600])
    write_tables(CURVES, found, "a machine", tmp_path)
    rows = list(csv.DictReader((tmp_path / "curves.csv").open(encoding="utf-8")))
    assert len(rows) == sum(len(one.points) for one in CURVES)
    assert list(rows[0]) == [
        "recipe", "lr", "seed", "iteration", "weighted_passes", "seconds", "held_out_reward", "training_reward",
    ]  # fmt: skip
    assert (rows[1]["weighted_passes"], rows[1]["held_out_reward"]) == ("400", "0.6")
    rows = list(csv.DictReader((tmp_path / "summary.csv").open(encoding="utf-8")))
    assert [(row["recipe"], row["lr"], row["mean"], row["lowest"], row["highest"]) for row in rows] == [
        ("a", "0.0003", "0.725", "0.7", "0.75"),
        ("b", "0.0001", "0.69", "0.64", "0.74"),
    ]
    assert rows[0]["rewards"] == "0.7000 0.7500"
    assert rows[0]["seeds"] == "1 2"
    assert "highest mean over seeds" in rows[0]["lr_chosen_by"]
    console = Console(width=100, file=io.StringIO())
    draw_comparison(found, console)
    text = console.file.getvalue()
    assert "held-out reward at 600 weighted passes" in text
    assert "0.725" in text
    assert "the highest mean over 2 seeds" in text
    assert "Best at the largest learning rate tried, so try larger ones: a." in text
    assert "do not count yet: b 0.0003" in text
