"""What is told of signal and noise of the gradient: on measurements that leave no doubt, and on those that do."""

import math

import numpy as np
import pytest

from engine_cases import tiny_recipe
from flowgrove.recipe.keys import find_key
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.content import run_content
from flowgrove.report.findings import find
from flowgrove.report.gradient import pooled
from flowgrove.run.metric_keys import find_metric
from flowgrove.update.noise_estimates import estimate, student
from report_cases import LINE, synthetic_run

WINDOW = {"steps": 6, "window": {"strategy": "frozen", "size": 3, "start": 0}}
TREE = {"steps": 6, "group_size": 8, "tree": {"splits": [0, 1, 2], "fanout": 2}, "window": {"strategy": "none"}}
PROMPTS = 10


@pytest.fixture(scope="module", params=[WINDOW, TREE], ids=["window", "tree"])
def recipe(request, tmp_path_factory):
    """10 prompts an iteration, 40 iterations, steps 0 to 2."""
    data, run = {"prompts_per_iteration": PROMPTS}, {"iterations": 40}
    return load_recipe(tiny_recipe(tmp_path_factory.mktemp("recipe"), rollout=request.param, data=data, run=run))


def lines_of(measurements, count=30, leaf_share=0.9):
    """`measurements`: {step: (signal, error, noise)} with all; every third line tells of them."""
    told = {
        name: {key: values[place] for key, values in measurements.items()}
        for place, name in enumerate(("gradient_signal", "gradient_signal_error", "gradient_noise"))
    }
    told["gradient_snr_error"] = {
        key: PROMPTS * error / noise if noise else None for key, (_, error, noise) in measurements.items()
    }
    told["gradient_part"] = {key: values[0] for key, values in measurements.items() if key != "all"}
    told["gradient_leaf_share"] = {"all": leaf_share}
    return [LINE | {"iteration": n} | (told if n % 3 == 0 else {}) for n in range(count)]


# errors are of one measurement: of ten together they are a third of it
STEPS = {"0": (2.0, 0.5, 20.0), "1": (2.0, 0.5, 20.0), "2": (2.0, 0.5, 20.0)}
HEALTHY = {"all": (6.0, 1.0, 60.0), **STEPS}
FOUND = {
    "noise": ({"all": (0.0, 0.1, 1000.0), **dict.fromkeys(STEPS, (0.0, 0.1, 300.0))}, "warning"),
    "silent": ({**HEALTHY, "2": (0.1, 1.0, 40.0)}, "note"),
    "signal": ({"all": (60.0, 1.0, 30.0), **dict.fromkeys(STEPS, (10.0, 0.5, 10.0))}, "note"),
}
NOT_FOUND = {
    "a healthy run": HEALTHY,
    "noise that the run's iterations average": {**HEALTHY, "all": (0.0, 0.1, 10.0)},
    "a wide interval": {"all": (0.0, 1000.0, 1000.0), **dict.fromkeys(STEPS, (0.0, 300.0, 300.0))},
    "a silent step that brings little noise": {**HEALTHY, "2": (0.0, 1.0, 10.0)},
    "silent steps where nothing has a signal": {"all": (0.5, 3.0, 60.0), **dict.fromkeys(STEPS, (0.1, 3.0, 20.0))},
    "an interval that reaches down to ten": {**HEALTHY, "all": (35.0, 10.0, 30.0)},
    "no ratio": {"all": (None, None, None), **dict.fromkeys(STEPS, (None, None, None))},
    "no noise": {"all": (0.0, 0.0, 0.0), **dict.fromkeys(STEPS, (0.0, 0.0, 0.0))},
}


@pytest.mark.parametrize("case", FOUND)
def test_what_is_beyond_doubt_is_told_with_what_to_change(recipe, case):
    measurements, kind = FOUND[case]
    (finding,) = find(recipe, lines_of(measurements))
    assert (finding.name, finding.kind) == (case, kind)
    assert find_metric(finding.metric)
    words = [word.strip(".,;:()") for word in finding.action.split()]
    keys = [word for word in words if "." in word]
    assert keys
    assert all(find_key(key) for key in keys)
    assert find(recipe, lines_of(measurements, count=12)) == [], "four measurements are not judged"


@pytest.mark.parametrize("case", NOT_FOUND)
def test_what_is_not_is_not(recipe, case):
    assert find(recipe, lines_of(NOT_FOUND[case])) == []


def test_a_finding_tells_the_numbers_that_it_saw(recipe):
    (noise,) = find(recipe, lines_of(FOUND["noise"][0]))
    upper = student(10 * 7) * PROMPTS * 0.1 / 10**0.5 / 1000
    assert f"at most {upper:.2g}" in noise.text
    assert "(10 measurements)" in noise.text
    assert "90% of the noise is the luck of the leaves" in noise.text
    assert noise.action.startswith("Raise rollout.group_size, or")
    (prompts,) = find(recipe, lines_of(FOUND["noise"][0], leaf_share=0.2))
    assert prompts.action.startswith("Raise data.prompts_per_iteration, or")
    (silent,) = find(recipe, lines_of(FOUND["silent"][0]))
    assert silent.title.startswith("Step 2 has no signal")
    assert f"{40 / 80:.0%} of the noise" in silent.text
    tree = recipe.rollout.tree is not None
    assert ("rollout.tree.splits" in silent.action) is tree
    assert "an earlier place" in silent.action


def test_a_depth_of_two_nodes_is_told_where_it_is_far_below_the_others(tmp_path):
    data, run = {"prompts_per_iteration": PROMPTS}, {"iterations": 40}
    recipe = load_recipe(tiny_recipe(tmp_path, rollout=TREE, data=data, run=run))
    (finding,) = find(recipe, lines_of({**HEALTHY, "0": (0.2, 0.1, 20.0)}))
    assert finding.name == "pairs"
    assert finding.text.startswith("Step 0 has two nodes a prompt")
    assert find(recipe, lines_of({**HEALTHY, "1": (0.2, 0.1, 20.0)})) == [], "a depth of four"
    for change in ({"std": "leaves"}, {"std_shrinkage": 2.0}):
        other = recipe.model_copy(update={"credit": recipe.credit.model_copy(update=change)})
        assert find(other, lines_of({**HEALTHY, "0": (0.2, 0.1, 20.0)})) == []


def test_measurements_are_pooled_by_their_means(recipe):
    lines = lines_of(HEALTHY, count=6)
    lines[3] |= {
        "gradient_signal": {"all": 0.0, "0": None, "1": 0.0, "2": 0.0},
        "gradient_signal_error": {"all": 2.0, "0": None},
        "gradient_noise": {"all": 20.0, "0": None}, "dropped_prompts": 4,
    }  # fmt: skip
    lines[3]["gradient_snr_error"] = {"all": 4.0, "0": None}
    measured = [lines[0], lines[3]]
    whole = pooled(recipe, measured)
    assert (whole.measurements, whole.prompts, whole.signal, whole.noise) == (2, 8, 3.0, 40.0)
    assert whole.error == pytest.approx((1 + 4) ** 0.5 / 2)
    assert whole.snr == pytest.approx(8 * 3 / 40)
    errors = [PROMPTS * 1.0 / 60, 4.0]
    assert whole.interval == pytest.approx(student(2 * 5) * np.hypot(*errors) / 2)
    assert pooled(recipe, measured, "0").measurements == 1
    assert pooled(recipe, measured, "7") is None


@pytest.mark.parametrize(("count", "groups"), [(2, 8), (5, 8), (20, 8), (5, 4), (5, 2)])
def test_the_interval_of_several_measurements_holds_what_is_true(count, groups, tmp_path):
    """Prompts whose noise of 2 lies half along a signal of 1."""
    recipe = load_recipe(tiny_recipe(tmp_path, data={"prompts_per_iteration": groups}))
    generator, inside, counts = np.random.default_rng(5), [], np.ones(groups)
    names = ("gradient_signal", "gradient_signal_error", "gradient_noise", "gradient_snr_error")
    for _ in range(300):
        lines = []
        for _ in range(count):
            sums = generator.standard_normal((groups, 30)) / 30**0.5
            sums[:, 0] += 1 + generator.standard_normal(groups)
            values = [None if math.isnan(value) else value for value in estimate(sums, counts)]
            lines.append({name: {"all": value} for name, value in zip(names, values, strict=True)})
        one = pooled(recipe, lines)
        inside.append(abs(one.snr - groups / 2) <= one.interval)
    assert np.mean(inside) > 0.9


def test_two_prompts_have_an_interval_from_the_second_measurement_on(tmp_path):
    lines = [line | {"gradient_snr_error": {"all": None}} for line in lines_of(HEALTHY, count=8)]
    lines[3]["gradient_signal"] = {"all": 4.0}
    recipe = synthetic_run(tmp_path / "run", lines, rollout=WINDOW, data={"prompts_per_iteration": 2})
    assert run_content(recipe, tmp_path / "run")["gradient"]["over"]["iteration"] == [3, 6]


def test_siblings_get_no_advantage_that_they_do_not_have(tmp_path):
    data, run, credit = {"prompts_per_iteration": PROMPTS}, {"iterations": 40}, {"baseline": "siblings"}
    recipe = load_recipe(tiny_recipe(tmp_path, rollout=TREE, data=data, run=run, credit=credit))
    (finding,) = find(recipe, lines_of({**HEALTHY, "0": (0.2, 0.1, 20.0)}))
    assert finding.name == "pairs"
    assert ".71" not in finding.text


def test_the_page_has_what_the_measurements_say(tmp_path):
    lines = lines_of(HEALTHY, count=8)
    recipe = synthetic_run(
        tmp_path / "run", lines, rollout=WINDOW, data={"prompts_per_iteration": PROMPTS}, run={"iterations": 8}
    )
    found = run_content(recipe, tmp_path / "run")["gradient"]
    assert found["steps"] == [0, 1, 2]
    assert found["snr"] == pytest.approx([1.0] * 3)
    assert found["interval"] == pytest.approx([student(3 * 7) * PROMPTS * 0.5 / 3**0.5 / 20] * 3)
    assert found["noise"] == found["signal"] == pytest.approx([1 / 3] * 3)
    assert found["over"]["iteration"] == [0, 3, 6]
    assert found["over"]["seconds"] == [0, 4.5, 9]
    assert found["over"]["snr"] == pytest.approx([1.0] * 3)
    assert found["over"]["interval"] == pytest.approx([student(n * 7) * PROMPTS / 60 / n**0.5 for n in (1, 2, 3)])
    unsure = [line | ({"gradient_signal": {"all": -1.0}} if n % 3 == 0 else {}) for n, line in enumerate(lines)]
    other = synthetic_run(tmp_path / "other", unsure, rollout=WINDOW, data={"prompts_per_iteration": PROMPTS})
    assert run_content(other, tmp_path / "other")["gradient"]["signal"] == []


def test_a_run_that_does_not_measure_has_none_of_it(tmp_path):
    recipe = synthetic_run(tmp_path / "run", [LINE])
    found = run_content(recipe, tmp_path / "run")["gradient"]
    assert (found["steps"], found["over"]["snr"]) == ([], [])
