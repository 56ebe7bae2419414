"""σ tables: MATH §1."""

import itertools
import json
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowgrove.models.families import configuration_folder
from flowgrove.plan.sigmas import listed_sigmas, recipe_sigmas, scheduler_sigmas, shifted_sigmas
from flowgrove.recipe.loading import parse_recipe
from planner_cases import recipe_content, user_error

SHIFTS = st.floats(0.01, 100.0)
STEPS = st.integers(1, 400)


def entries(table, steps):
    return [table(i) for i in range(steps + 1)]


@given(SHIFTS, STEPS)
def test_a_shifted_table_is_exactly_1_and_0_at_its_ends(shift, steps):
    table = shifted_sigmas(steps, shift)
    assert (table(0), table(steps)) == (1.0, 0.0)


def test_mistake_2_shifts_for_which_the_textbook_form_misses_1_start_at_exactly_1():
    missed = [k / 1000 for k in range(1, 20000) if (k / 1000) / (1 + (k / 1000 - 1)) != 1.0]
    assert len(missed) > 100
    assert all(shifted_sigmas(10, shift)(0) == 1.0 for shift in missed)


@given(SHIFTS, STEPS)
def test_a_shifted_table_falls_strictly(shift, steps):
    table = entries(shifted_sigmas(steps, shift), steps)
    assert all(later < earlier for earlier, later in itertools.pairwise(table))


@given(SHIFTS, STEPS, st.floats(0, 1))
def test_a_shifted_table_follows_its_formula_between_two_entries_too(shift, steps, share):
    position = share * steps
    t = 1 - position / steps
    assert shifted_sigmas(steps, shift)(position) == pytest.approx(
        shift * t / (1 + (shift - 1) * t), rel=1e-12, abs=1e-15
    )


def test_shift_1_is_linear():
    assert entries(shifted_sigmas(8, 1.0), 8) == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=30, unique=True), st.floats(0, 1))
def test_a_listed_table_is_linear_over_its_index_and_exact_at_its_entries(values, share):
    values = [*sorted(values, reverse=True), 0.0]
    table = listed_sigmas(values)
    assert entries(table, len(values) - 1) == values
    position = share * (len(values) - 1)
    assert table(position) == pytest.approx(numpy.interp(position, range(len(values)), values), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [1.0],
        [1.0, 0.5, 0.01],
        [0.0, 0.5, 1.0],
        [1.0, 0.5, 0.5, 0.0],
        [1.0, 0.4, 0.5, 0.0],
        [1.0001, 0.5, 0.0],
        [1.0, 0.5, -0.1, 0.0],
        [math.nan, 0.5, 0.0],
        [1.0, math.nan, 0.0],
    ],
)
def test_a_listed_table_that_does_not_fall_strictly_from_1_to_0_is_refused(values):
    assert "rollout.shift" in user_error(listed_sigmas, values)


def scheduler_folder(folder, **config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.save_pretrained(folder / "scheduler")
    return scheduler


def test_the_table_of_sd3_is_the_one_its_own_scheduler_sets(tmp_path):
    scheduler = scheduler_folder(tmp_path, shift=3.0)
    scheduler.set_timesteps(10)
    table = entries(scheduler_sigmas(tmp_path, 10, tokens=1024), 10)
    assert table == scheduler.sigmas.double().tolist()
    assert [round(table[i], 4) for i in (0, 1, 2, 9, 10)] == [1.0, 0.9601, 0.9133, 0.0089, 0.0]


def test_the_table_of_sd3_has_the_shift_applied_twice(tmp_path):
    scheduler_folder(tmp_path, shift=3.0)

    def shifted(t):
        return 3 * t / (1 + 2 * t)

    expected = [shifted(t) for t in numpy.linspace(shifted(1.0), shifted(0.001), 10)] + [0.0]
    assert entries(scheduler_sigmas(tmp_path, 10, tokens=1024), 10) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "config", [{}, {"base_shift": 0.4, "max_shift": 2.0, "base_image_seq_len": 100, "max_image_seq_len": 900}]
)
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_shifting_takes_the_pipelines_own_shift_for_the_picture_size(tmp_path, config, tokens):
    scheduler = scheduler_folder(tmp_path, use_dynamic_shifting=True, **config)
    c = scheduler.config
    mu = c.base_shift + (c.max_shift - c.base_shift) * (tokens - c.base_image_seq_len) / (
        c.max_image_seq_len - c.base_image_seq_len
    )
    scheduler.set_timesteps(8, mu=mu)
    table = entries(scheduler_sigmas(tmp_path, 8, tokens), 8)
    assert table == pytest.approx(scheduler.sigmas.double().tolist(), abs=2e-7)
    middle = numpy.linspace(1, 0.001, 8)[3]
    assert table[3] == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / middle - 1), abs=1e-6)


def test_dynamic_shifting_fills_what_the_file_leaves_out_with_the_schedulers_defaults(tmp_path):
    scheduler_folder(tmp_path / "full", use_dynamic_shifting=True)
    (tmp_path / "brief" / "scheduler").mkdir(parents=True)
    config = '{"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true}'
    (tmp_path / "brief" / "scheduler" / "scheduler_config.json").write_text(config)
    full, brief = (scheduler_sigmas(tmp_path / name, 8, tokens=2000) for name in ("full", "brief"))
    assert entries(full, 8) == entries(brief, 8)


def test_a_folder_without_a_scheduler_is_an_error_that_names_the_file_and_the_key(tmp_path):
    text = user_error(scheduler_sigmas, tmp_path / "absent", 10, 1024)
    assert "rollout.shift" in text
    assert str(tmp_path / "absent" / "scheduler" / "scheduler_config.json") in text


def test_a_scheduler_that_rises_is_refused(tmp_path):
    scheduler_folder(tmp_path, shift=3.0, invert_sigmas=True)
    assert "rollout.shift" in user_error(scheduler_sigmas, tmp_path, 10, 1024)


@pytest.mark.parametrize(
    "text",
    [
        "version https://git-lfs.github.com/spec/v1",
        "[]",
        "{}",
        '{"_class_name": "NotASchedulerOfDiffusers"}',
        '{"_class_name": "PNDMScheduler"}',
    ],
    ids=["not JSON", "not a mapping", "no class", "unknown class", "not a flow-matching scheduler"],
)
def test_a_scheduler_that_gives_no_table_is_a_user_error(tmp_path, text):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    assert "rollout.shift" in user_error(scheduler_sigmas, tmp_path, 10, 1024)


FULL_SIZE = {
    "flux": {"path": "black-forest-labs/FLUX.1-dev", "height": 720, "width": 720},
    "qwen_image": {"path": "Qwen/Qwen-Image", "height": 512, "width": 768},
    "wan": {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"},
    "sd3": {"path": "stabilityai/stable-diffusion-3.5-medium", "height": 512, "width": 512},
}


@pytest.mark.parametrize("adapter", FULL_SIZE)
def test_the_table_of_a_full_size_model_is_the_one_that_its_pipeline_sets(adapter):
    import diffusers
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    recipe = parse_recipe(
        recipe_content(model={"adapter": adapter, **FULL_SIZE[adapter]}, rollout={"shift": None, "steps": 10})
    )
    folder = configuration_folder(recipe.model)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    if adapter in ("flux", "qwen_image"):  # as their __call__ does
        tokens = (recipe.model.height // 16) * (recipe.model.width // 16)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[key] for key in keys))
        retrieve_timesteps(scheduler, 10, "cpu", sigmas=numpy.linspace(1.0, 1 / 10, 10), mu=mu)
    else:
        scheduler.set_timesteps(10)
    table = recipe_sigmas(recipe)
    assert entries(table, 10) == pytest.approx(scheduler.sigmas.double().tolist(), abs=1e-7)
    assert table.source.startswith(config["_class_name"])
    assert ("dynamic shift" in table.source) == (adapter in ("flux", "qwen_image"))


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        (
            "DEISMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
            "it takes no sigmas",
        ),
        ("FlowMatchHeunDiscreteScheduler", {}, "it takes no sigmas"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": "three"}, "does not give a table of 8 steps"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"use_dynamic_shifting": True, "max_image_seq_len": 256},
            "does not give a table of 8 steps",
        ),
        ("DiffusionPipeline", {"use_flow_sigmas": True}, "which is no flow-matching scheduler"),
        ("FlowMatchNonesuch", {}, "which is no flow-matching scheduler"),
    ],
)
def test_a_scheduler_that_gives_no_table_is_one_line(tmp_path, name, config, text):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    told = user_error(scheduler_sigmas, tmp_path, 8, 256, True)
    assert text in told
    assert "set rollout.shift to a number" in told
