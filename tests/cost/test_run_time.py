"""Predicted seconds: curves of what was measured, whose measurements serve, sums by hand, and the command."""

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from engine_cases import refuse, strict_json, succeed, tiny_recipe
from flowgrove.cost.passes import Pass
from flowgrove.cost.run_time import Cheap, predict_time
from flowgrove.cost.speeds import Measured, Published, flops_of, seconds_at
from flowgrove.errors import UserError
from flowgrove.models.geometry import Geometry
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.flops import Flops
from flowgrove.plan.identity import Identity, score_key
from flowgrove.plan.optimizer_step import OptimizerStep
from flowgrove.rates.kept import ModelTimes, Passes, Rate, Rates, keep_rates, rates_of
from flowgrove.rates.published import DEVICES, UTILISATION, published
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.cost_view import draw_time, time_json
from flowgrove.setup import Setup
from policy_cases import CPU, small_recipe

GEOMETRY = Geometry((4, 8, 8), 32, 32, 8, None, 16, 9, 19)
FLOPS = Flops(
    GEOMETRY, 1, 1, forward=100, backward=200, recomputed=90, extrapolated=60, reference=95, decode=50, encode=7
)
RECIPE = small_recipe(model={"adapter": "sd3", "path": "tiny", "dtype": "fp32"})
IDENTITY = Identity.of(RECIPE)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def times(per_flop=1.0, flops=100.0, identity=IDENTITY, kinds=("forward", "kept", "backward", "decode"), **more):
    """A model all of whose passes take `per_flop` seconds an operation."""
    curve = Passes(flops=flops, seconds={1: per_flop * flops, 4: 4 * per_flop * flops})
    return ModelTimes(
        name="it", architecture=identity.architecture, size=identity.size, dtype=identity.dtype,
        settings=identity.settings, source="tune", date="2026-01-02", passes=dict.fromkeys(kinds, curve),
        step=identity.step.name, **more,
    )  # fmt: skip


def rates(**models):
    return Rates(device="it", models=models, matrix={"fp32": Rate(rate=4.0, date="")})


# Curves


@pytest.mark.parametrize(
    ("flops", "seconds"),
    [(10, 5), (20, 6), (15, 5.5), (40, 8), (30, 7), (60, 14), (80, 20), (160, 40), (5, 2.5)],
)
def test_between_measured_passes_lies_a_straight_line_and_beyond_them_their_utilisation(flops, seconds):
    curve = Passes(flops=10, seconds={8: 20, 1: 5, 4: 8})  # a fixed cost, then as fast as it gets
    assert seconds_at(curve, flops) == pytest.approx(seconds)


def test_flops_of_a_pass_are_those_of_its_kind():
    found = {kind: flops_of(Pass(kind, 3, 2), FLOPS) for kind in ("forward", "cheap", "kept", "renewed")}
    assert set(found.values()) == {600}
    others = [flops_of(Pass(kind, 1, 1), FLOPS) for kind in ("extrapolated", "reference", "backward", "train")]
    assert others == [60, 95, 290, 390]


# What was measured


def other(**changes):
    return replace(IDENTITY, **changes)


def test_this_very_model_is_preferred_then_other_settings_then_another_size_then_the_nearest_model():
    candidates = [
        ("this model", times(1.0)),
        ("this model with other settings", times(2.0, identity=other(settings={"attention": "flash"}))),
        ("this architecture at another size", times(3.0, identity=other(size="s"))),
        ("another model", times(4.0, flops=150.0, identity=other(architecture="a"))),
        ("another model", times(5.0, flops=1000.0, identity=other(architecture="b"))),
    ]
    for number in range(len(candidates)):
        left = candidates[number:]
        models = {str(place): one for place, (_, one) in reversed(list(enumerate(left)))}
        speeds = Measured(rates(**models), IDENTITY, FLOPS)
        assert speeds.passes(Pass("forward", 1, 1), FLOPS) == pytest.approx((number + 1) * 100)
        assert left[0][0] in speeds.rests_on["rollout"]
        assert "2026-01-02" in speeds.rests_on["update"]


def test_of_two_that_are_as_near_the_one_measured_last_serves():
    keep_rates(CPU, models={"a": times(1.0, score={"k": 1.0}), "b": times(2.0, score={"k": 2.0})})
    keep_rates(CPU, models={"a": times(3.0, score={"k": 3.0})})  # again
    speeds = Measured(rates_of(CPU), IDENTITY, FLOPS)
    assert speeds.passes(Pass("forward", 1, 1), FLOPS) == pytest.approx(3 * 100)
    assert speeds.score("k") == 3.0


def test_a_kind_that_this_model_lacks_is_taken_from_the_next():
    models = {"a": times(1.0, kinds=("forward", "backward")), "b": times(2.0, identity=other(architecture="b"))}
    speeds = Measured(rates(**models), IDENTITY, FLOPS)
    assert speeds.passes(Pass("kept", 1, 1), FLOPS) == pytest.approx(200)
    assert speeds.passes(Pass("train", 1, 1), FLOPS) == pytest.approx(200 + 290)
    assert speeds.decode(2, FLOPS) == pytest.approx(2 * 100)


def test_cheap_passes_take_the_share_of_a_forward_that_they_took_where_they_were_measured():
    name, cheap = "forward in fp8", Pass("cheap", 2, 1)
    there = times(3.0, identity=other(architecture="b"))
    half = Passes(flops=100.0, seconds={1: 150.0, 4: 600.0})
    measured = there.model_copy(update={"passes": {**there.passes, name: half}})
    speeds = Measured(rates(a=times(1.0), b=measured), IDENTITY, FLOPS, name)
    assert speeds.knows_cheap
    assert speeds.passes(cheap, FLOPS) == pytest.approx(200 / 2)
    assert speeds.passes(Pass("forward", 2, 1), FLOPS) == pytest.approx(200)
    assert speeds.rests_on[name] == "another model (it), measured by tune on 2026-01-02"
    for models, asked in (({"a": times(1.0)}, name), ({"a": times(1.0), "b": measured}, "forward in int8")):
        speeds = Measured(rates(**models), IDENTITY, FLOPS, asked)
        assert not speeds.knows_cheap
        assert speeds.passes(cheap, FLOPS) == pytest.approx(200)
        assert asked not in speeds.rests_on


@pytest.mark.parametrize("models", [{}, {"a": times(identity=other(dtype="bf16"))}, {"a": times(kinds=("decode",))}])
def test_nothing_measured_in_this_dtype_says_what_to_do(models):
    with pytest.raises(UserError, match=r"run `flowgrove tune` on the recipe first, or give --device"):
        Measured(rates(**models), IDENTITY, FLOPS)


def test_encoding_steps_and_scores_are_of_this_architecture_or_follow_from_rates():
    own = Measured(rates(a=times(encode=3.0, update=4.0, trained=1000, score={"k": 5.0})), IDENTITY, FLOPS)
    assert (own.encode(FLOPS), own.update(1000), own.score("k"), own.score("another")) == (3.0, 4.0, 5.0, None)
    foreign = times(2.0, encode=3.0, update=4.0, trained=1000, identity=other(architecture="b"))
    speeds = Measured(rates(a=foreign), IDENTITY, FLOPS)
    assert speeds.encode(FLOPS) == pytest.approx(7 * 2.0)
    assert speeds.encode(replace(FLOPS, encode=None)) is None
    assert speeds.update(1000) is None
    copied = Rates(device="it", models={"a": foreign}, copied=Rate(rate=8.0, date=""))
    assert Measured(copied, IDENTITY, FLOPS).update(1000) == 40 * 1000 / 8.0


def test_a_step_is_in_proportion_to_the_weights_that_a_rank_trains():
    speeds = Measured(rates(a=times(update=4.0, trained=1000)), IDENTITY, FLOPS)
    assert speeds.update(125) == pytest.approx(0.5)


def test_a_measured_step_is_only_that_of_its_optimizer_with_its_average():
    steps = [
        OptimizerStep(name, "fp32", False, averaged) for name in ("adamw", "adamw_8bit") for averaged in (False, True)
    ]
    identities = [other(step=step) for step in steps]
    models = {one.key: times(update=number + 1.0, trained=10, identity=one) for number, one in enumerate(identities)}
    found = [Measured(rates(**models), one, FLOPS).update(10) for one in identities]
    assert found == [1.0, 2.0, 3.0, 4.0]
    double = other(step=OptimizerStep("adamw", "fp64", False, False))
    assert Measured(rates(**models), double, FLOPS).update(10) is None


@pytest.mark.parametrize(
    ("dtype", "update", "expected"),
    [
        ("fp32", {}, 12 + 28),
        ("bf16", {}, 12 + 28 + 6),
        ("bf16", {"ema_decay": 0.9}, 12 + 28 + 6 + 12),
        ("fp64", {"ema_decay": 0.9}, 24 + 56 + 24),
        ("bf16", {"optimizer": "apex_fused_adam"}, 12 + 28 + 6),
        ("bf16", {"optimizer": "adamw_8bit"}, 12 + (8 + 4) + (4 + 8 + 4) + (12 + 6) + (8 + 4) + 6),
    ],
)
def test_bytes_of_a_step_are_what_is_read_and_written(dtype, update, expected):
    recipe = small_recipe(model={"adapter": "sd3", "path": "tiny", "dtype": dtype}, update=update)
    assert OptimizerStep.of(recipe).bytes_per_weight == expected


# Published rates


def test_the_table_has_plausible_devices():
    for name, device in DEVICES.items():
        assert published(name.upper().replace("-", "_")) is device
        assert 20e12 < device.matrix["bf16"] < 3e15
        assert device.matrix.get("fp32", 0) < device.matrix["bf16"]
        assert 2e11 < device.copied < 1e13
        assert 20e9 < device.memory < 200e9


def test_a_published_rate_is_taken_at_its_utilisation():
    bf16 = small_recipe(model={"adapter": "flux", "path": "black-forest-labs/FLUX.1-dev", "dtype": "bf16"})
    speeds = Published(published("h100"), bf16, 0.5)
    assert speeds.passes(Pass("train", 2, 1), FLOPS) == pytest.approx(2 * 390 / (0.5 * 989.4e12))
    assert speeds.decode(3, FLOPS) == pytest.approx(150 / (0.5 * 989.4e12))
    assert speeds.update(10**9) == pytest.approx(46e9 / 3350e9)
    assert speeds.score("any") is None
    wan = small_recipe(model={"adapter": "wan", "path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "dtype": "bf16"})
    half = Published(published("h100"), wan, 0.5)
    assert half.decode(3, FLOPS) == pytest.approx(2 * speeds.decode(3, FLOPS))  # a VAE in fp32, convolved in TF32
    with pytest.raises(UserError, match="no rate of NVIDIA B200 is known: known are bf16"):
        Published(published("b200"), RECIPE, 0.5)


# A run


def test_a_moving_window_is_summed_over_its_positions(tmp_path):
    """At a second an operation, by the plan's own counts."""
    window = {"strategy": "progressive", "size": 2, "every": 2}
    recipe = load_recipe(
        tiny_recipe(
            tmp_path,
            rollout={"steps": 4, "shift": 1.0, "group_size": 4, "shared_initial_noise": True, "window": window},
            engine={"device": "cpu", "reuse_rollout_graph": False},
            run={"iterations": 5, "eval_every": 2, "eval": {"samples": 3, "steps": 6}},
        )
    )
    setup = Setup(recipe)
    trained = setup.memory("cpu", ALONE).sizes.trained
    own = times(encode=0.25, update=0.5, trained=trained, score={score_key(recipe, 1024): 8.0})
    keep_rates(CPU, {"fp32": 2.0}, 1.0, {"it": own})
    found = predict_time(setup, ALONE)
    (flops,) = found.flops
    counts = [setup.plan(iteration).counts for iteration in range(5)]
    assert [(some.first, some.count) for some in found.iterations] == [(0, 3), (2, 2)]  # it begins anew
    assert len({count.rollout_forwards for count in counts}) > 1
    for stage, each in {
        "rollout": [2 * flops.forward * count.rollout_forwards for count in counts],
        "update": [2 * flops.train * count.train_passes for count in counts],
        "decode": [8 * flops.decode] * 5,
        "rewards": [8 * 8.0] * 5,
        "optimiser": [2 * 0.5] * 5,
    }.items():
        assert found.iteration.seconds[stage] == pytest.approx(sum(each) / 5), stage
    evaluation = 2 * 3 * (6 * flops.forward + flops.decode + 8.0)
    assert found.evaluation.total == pytest.approx(evaluation)
    assert found.evaluations == 4  # before iterations 0, 2 and 4, and at the end
    assert found.texts == 7
    assert found.encoding == pytest.approx(7 * 0.25)
    assert found.seconds == pytest.approx(5 * found.iteration.total + 4 * evaluation + 7 * 0.25)
    assert found.utilisation("rollout") == pytest.approx(0.5)  # an operation a second, of two
    assert found.not_predicted == ["loading, checkpoints"]


def test_of_several_ranks_the_one_with_the_most_prompts_is_predicted(tmp_path):
    recipe = load_recipe(
        tiny_recipe(
            tmp_path, data={"prompts": "train.txt", "eval_prompts": "eval.txt", "prompts_per_iteration": 5},
            rollout={"precision": "int8"}, engine={"device": "cpu", "distributed": "ddp", "reuse_rollout_graph": False},
            run={"gradient_noise_every": 5},
        )
    )  # fmt: skip
    keep_rates(CPU, {}, 1.0, {"it": times()})
    alone, divided = (predict_time(Setup(recipe), division) for division in (ALONE, Division(2)))
    assert divided.iteration.seconds["rollout"] == pytest.approx(3 / 5 * alone.iteration.seconds["rollout"])
    assert divided.iteration.seconds["update"] == pytest.approx(3 / 5 * alone.iteration.seconds["update"])
    assert divided.evaluation.seconds["decode"] == pytest.approx(alone.evaluation.seconds["decode"] / 2)
    assert "measuring the gradient's noise" in divided.not_predicted
    assert "what rollout.precision saves" in divided.not_predicted
    assert "what rollout.attention saves" not in divided.not_predicted
    assert "measuring rollout_distance" in divided.not_predicted
    assert "what ranks send each other" in divided.not_predicted
    assert divided.iteration.seconds["rewards"] is None
    assert "rewards" in divided.not_predicted


@pytest.mark.parametrize("every", [0, 1])
def test_kernels_of_steps_that_do_not_train_are_not_predicted(tmp_path, every):
    recipe = load_recipe(tiny_recipe(tmp_path, rollout={"attention": "sage"}, run={"eval_every": every}))
    keep_rates(CPU, {}, 1.0, {"it": times()})
    found = predict_time(Setup(recipe), ALONE)
    told = found.not_predicted
    assert found.cheap == Cheap("forward with sage attention", ("rollout.attention",), None)
    assert found.rests_on[found.cheap.name].startswith("charged as full precision")
    assert "what rollout.attention saves" in told
    assert "what rollout.precision saves" not in told
    assert ("measuring rollout_distance" in told) == (every > 0)


def test_steps_in_8_bits_are_charged_as_they_were_measured(tmp_path):
    """Two of four steps train, so that 4 of 6 rows of a prompt's rollout are cheap, at 0.4 of a forward."""
    shape = {"steps": 4, "group_size": 4, "shared_initial_noise": True, "window": {"strategy": "frozen", "size": 2}}
    path = tiny_recipe(
        tmp_path, rollout={**shape, "precision": "int8"}, run={"eval_every": 0},
        engine={"device": "cpu", "reuse_rollout_graph": False},
    )  # fmt: skip
    setup, own = Setup(load_recipe(path)), times()
    cheap = {"forward in int8": Passes(flops=100.0, seconds={1: 40.0})}
    keep_rates(CPU, {}, 1.0, {"it": own.model_copy(update={"passes": {**own.passes, **cheap}})})
    found, (plan, counts) = predict_time(setup, ALONE), (setup.first_plan, setup.first_plan.counts)
    (flops,) = found.flops
    forwards = counts.rollout_forwards - 0.6 * plan.cheap_forwards()
    assert 0 < plan.cheap_forwards() < counts.rollout_forwards
    assert found.iteration.seconds["rollout"] == pytest.approx(2 * flops.forward * forwards)
    assert found.cheap == Cheap("forward in int8", ("rollout.precision",), pytest.approx(0.4))
    assert not any("saves" in told for told in found.not_predicted)
    console = Console(record=True, width=200, file=io.StringIO())
    draw_time(found, console)
    assert "forward in int8: 0.40 of the time of a full one" in console.export_text()
    assert time_json(found)["time"]["cheap"] == asdict(found.cheap)
    assert "forward in int8" in found.rests_on


# The command


@pytest.mark.long
def test_plan_tells_seconds_at_published_rates(tmp_path):
    recipe = tiny_recipe(tmp_path)
    told = succeed("plan", recipe, "--time", "--device", "H100", "--utilisation", "0.5")
    assert "predicted time on one NVIDIA H100 SXM" in told.stdout
    assert "50% of 66.9 TFLOP/s (fp32, dense, published)" in told.stdout
    assert "not predicted: rewards" in told.stdout
    content = strict_json(succeed("plan", recipe, "--time", "--device", "h100", "--json").stdout)
    found = content["time"]
    mean = found["iteration"]
    expected = found["iteration_flops"]["rollout"] / (UTILISATION * 66.9e12)
    assert mean["rollout"] == pytest.approx(expected)
    assert mean["rewards"] is None
    assert mean["total"] == pytest.approx(sum(mean[stage] for stage in ("rollout", "decode", "update", "optimiser")))
    assert sum(some["count"] for some in found["iterations"]) == 3
    assert found["run"] > 3 * mean["total"]
    assert found["flops"][0]["train"] == found["flops"][0]["forward"] + found["flops"][0]["backward"]
    assert json.dumps(found)


def test_mistakes_are_a_line_each(tmp_path):
    recipe = tiny_recipe(tmp_path)
    line = refuse("plan", recipe, "--time", "--device", "h1000")
    assert "did you mean h100?" in line
    assert all(name in line for name in DEVICES)
    assert "run `flowgrove tune` on the recipe first, or give --device" in refuse("plan", recipe, "--time")
    assert "give --time, too" in refuse("plan", recipe, "--device", "h100")
    assert "give --device, too" in refuse("plan", recipe, "--time", "--utilisation", "0.3")
