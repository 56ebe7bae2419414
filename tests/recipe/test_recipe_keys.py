"""Recipes: DESIGN §3.2 and the errors of §3.3."""

import copy

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrove.recipe.loading import dump_recipe, load_recipe, parse_recipe
from planner_cases import recipe_content, recipes, user_error, value_at, write

# The values of DESIGN §3.2 for the keys that are built
DEFAULTS = {
    "model": {
        "dtype": "bf16",
        "lora": None,
        "base_precision": None,
        "init_lora": None,
        "guidance_scale": 1.0,
        "negative_prompt": None,
        "source_pictures": None,
        "cfg_normalization": None,
        "guidance_scale_2": None,
        "trained_experts": "both",
        "height": None,
        "width": None,
        "frames": None,
        "sizes": None,
        "text_tokens": None,
        "gradient_checkpointing": "full",
        "vae_tiling": False,
    },
    "data": {
        "eval_prompts": None,
        "prompts_per_iteration": 8,
        "prompt_key": None,
        "metadata": None,
        "embedding_cache": "auto",
    },
    "rollout": {
        "steps": 25,
        "shift": 3.0,
        "dynamics": "flow_sde",
        "noise_level": 0.7,
        "group_size": 12,
        "shared_initial_noise": True,
        "window": {
            "strategy": "all",
            "size": 4,
            "every": 25,
            "stride": 1,
            "start": 0,
            "range": None,
            "wrap": True,
            "min_every": 1,
            "decay_rate": 0.1,
            "decay_after": 13,
        },
        "tree": None,
        "tail": None,
        "guidance_range": None,
        "cache": None,
        "precision": None,
        "attention": None,
    },
    "credit": {
        "normalise": "per_reward",
        "baseline": "depth",
        "std": "group",
        "std_shrinkage": 0.0,
        "fusion_beta": 0.0,
        "adv_clip": 5.0,
        "prune": None,
    },
    "update": {
        "optimizer": "adamw",
        "lr": 1.0e-5,
        "lr_schedule": "constant",
        "warmup": 0,
        "weight_decay": 1.0e-4,
        "betas": [0.9, 0.999],
        "eps": 1.0e-8,
        "clip_range": 1.0e-4,
        "kl_weight": 0.0,
        "max_grad_norm": 1.0,
        "updates_per_iteration": 4,
        "edges_per_update": None,
        "partition": "trajectories",
        "step_fraction": 1.0,
        "step_weight": "uniform",
        "detach_unconditional": False,
        "ema_decay": None,
    },
    "engine": {
        "device": "auto",
        "backend": "auto",
        "token_budget": "auto",
        "share": True,
        "exact_replay": False,
        "attention": "auto",
        "split_lengths": False,
        "compile": False,
        "cuda_graphs": False,
        "reuse_rollout_graph": "auto",
        "ahead": False,
        "distributed": "none",
        "reshard_after_forward": "auto",
        "shard_degree": None,
    },
    "run": {
        "iterations": 300,
        "seed": 42,
        "out": "runs/NAME",
        "checkpoint_every": 50,
        "keep_last": 3,
        "keep_best": False,
        "most_skipped_updates": 10,
        "eval_every": 25,
        "forest_every": None,
        "gradient_noise_every": None,
        "eval": {"steps": None, "guidance_scale": None, "samples": 1, "tuned_share": 1.0, "rewards": []},
        "log": ["jsonl", "tensorboard"],
        "tracking": {"project": None, "name": None, "entity": None, "group": None, "tags": [], "mode": None},
    },
}
NULL_SECTIONS = {
    "rollout.tree": (
        {},
        {"splits": [0, 3, 6, 9], "fanout": 2, "sibling_correlation": 0.0588, "split_noise_scale": 1.0},
    ),
    "rollout.tail": ({}, {"solver": "dpmpp_2m", "compress": 0.4}),
    "rollout.cache": ({}, {"interval": 3, "order": 1}),
    "credit.prune": (
        {"kind": "depth"},
        {"kind": "depth", "depths": 4, "first": 10, "stop": 19, "every": 30, "direction": "later"},
    ),
    "model.lora": ({"rank": 32, "alpha": 64}, {"rank": 32, "alpha": 64.0}),
    "model.init_lora": ({"path": "lora"}, {"path": "lora", "merge": False, "strength": 1.0}),
}
SECTIONS = ["", *DEFAULTS, "rollout.window", "run.eval", *NULL_SECTIONS]


def content_with(key, value):
    """The least recipe with `value` at the dotted key."""
    content = recipe_content()
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return content


def dumped(content):
    return yaml.safe_load(dump_recipe(parse_recipe(content)))


def test_defaults_are_those_of_the_design():
    told = dumped(recipe_content())
    assert told.pop("reward") == [{"name": "shapes", "label": None, "weight": 1.0}]
    assert (told["model"].pop("adapter"), told["model"].pop("path"), told["data"].pop("prompts")) == (
        "sd3",
        "tiny",
        "prompts.txt",
    )
    assert told == DEFAULTS


@pytest.mark.parametrize("key", NULL_SECTIONS)
def test_defaults_of_the_sections_that_are_null(key):
    given_keys, expected = NULL_SECTIONS[key]
    told = value_at(dumped(content_with(key, given_keys)), key)
    assert {name: told[name] for name in expected} == expected


def test_extreme_pruning_keeps_4_best_and_4_worst():
    assert dumped(content_with("credit.prune", {"kind": "extreme"}))["credit"]["prune"]["keep"] == 4


@pytest.mark.parametrize("key", ["model", "model.adapter", "model.path", "data", "data.prompts", "reward"])
def test_what_every_recipe_must_say(key):
    content = recipe_content()
    *sections, last = key.split(".")
    del value_at(content, ".".join(sections))[last]
    assert key in user_error(parse_recipe, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.adapter", "sd4"),
        ("model.dtype", "fp16"),
        ("model.lora", {"rank": 0, "alpha": 1}),
        ("data.prompts_per_iteration", 0),
        ("rollout", None),
        ("rollout.steps", 1),
        ("rollout.steps", 2.5),
        ("rollout.steps", [25]),
        ("rollout.shift", 0),
        ("rollout.shift", float("nan")),
        ("rollout.shift", float("inf")),
        ("rollout.dynamics", "sde"),
        ("rollout.noise_level", -0.1),
        ("rollout.group_size", 0),
        ("rollout.window.strategy", "sliding"),
        ("rollout.window.size", 0),
        ("rollout.window.every", 0),
        ("rollout.window.start", -1),
        ("rollout.window.range", [1]),
        ("rollout.window.range", [1, 2, 3]),
        ("rollout.window.range", 5),
        ("rollout.tree.fanout", 1),
        ("rollout.tree.sibling_correlation", 1.5),
        ("rollout.tail.compress", 0),
        ("rollout.tail.compress", 1.5),
        ("rollout.tail.solver", "euler"),
        ("reward", []),
        ("reward", {"name": "shapes"}),
        ("credit.std", "batch"),
        ("credit.adv_clip", 0),
        ("credit.prune.kind", "width"),
        ("update.lr", "fast"),
        ("update.lr", 0),
        ("update.clip_range", [1e-4]),
        ("update.clip_range", -1e-4),
        ("update.updates_per_iteration", 0),
        ("update.step_fraction", 0),
        ("update.step_fraction", 1.1),
        ("engine.token_budget", "much"),
        ("engine.device", "gpu"),
        ("run.seed", -1),
        ("run.seed", 2**32),
        ("run.iterations", 0),
        ("run.log", ["console"]),
        ("run.tracking.mode", "disabled"),
        ("run.tracking.tags", [""]),
        ("run.out", ["two\nlines"]),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(key, value):
    assert key in user_error(parse_recipe, content_with(key, value))


@pytest.mark.parametrize("splits", [[], [3, 0], [0, 3, 3], [-1, 2]])
def test_splits_must_rise(splits):
    text = user_error(parse_recipe, content_with("rollout.tree", {"splits": splits}))
    assert "rollout.tree" in text
    assert "splits" in text


def test_the_reward_at_fault_is_named():
    assert "reward.1.name" in user_error(parse_recipe, recipe_content(reward=[{"name": "shapes"}, {"weight": 2.0}]))
    assert "reward.1.weight" in user_error(
        parse_recipe, recipe_content(reward=[{"name": "shapes"}, {"name": "http", "weight": "much"}])
    )


def test_rewards_take_options_of_their_own():
    reward = {"name": "http", "weight": 0.5, "url": "http://localhost:8000"}
    assert dumped(recipe_content(reward=[reward]))["reward"] == [{"label": None, **reward}]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section or "recipe")
def test_a_mistyped_key_is_an_error_that_names_the_nearest_one(section):
    required = NULL_SECTIONS[section][0] if section in NULL_SECTIONS else None
    full = recipe_content() if required is None else content_with(section, required)
    keys = list(value_at(dumped(full), section))
    assert len(keys) >= 2
    for key in keys:
        content = copy.deepcopy(full)
        if section in ("rollout.window", "run.eval"):
            content = content_with(section, {})
        elif section and required is None:
            content.setdefault(section, {})
        value_at(content, section)[f"{key}x"] = 1
        text = user_error(parse_recipe, content)
        assert f"{section}.{key}x".lstrip(".") in text
        assert f" {key}?" in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rolout", "rollout"),
        ("rollout.grup_size", "group_size"),
        ("rollout.window.stratgy", "strategy"),
        ("rollout.tree.split", "splits"),
        ("rollout.tail.compres", "compress"),
        ("update.learning_rate_schedule", "lr_schedule"),
        ("update.updates_per_iter", "updates_per_iteration"),
        ("run.eval.guidance", "guidance_scale"),
    ],
)
def test_usual_slips_find_the_key_that_was_meant(typed, meant):
    text = user_error(parse_recipe, content_with(typed, 1))
    assert typed in text
    assert meant in text.replace(typed, "")


@pytest.mark.parametrize(
    ("typed", "meant"), [("model.adaptor", "adapter"), ("data.promts", "prompts"), ("rewards", "reward")]
)
def test_a_mistyped_required_key_is_reported_as_unknown_not_only_as_missing(typed, meant):
    content = recipe_content()
    *sections, last = typed.split(".")
    section = value_at(content, ".".join(sections))
    section[last] = section.pop(meant)
    text = user_error(parse_recipe, content)
    assert typed in text
    assert meant in text.replace(typed, "")


def test_an_unknown_key_that_resembles_nothing_lists_the_known_ones():
    text = user_error(parse_recipe, content_with("run.qqqq", 1))
    assert all(key in text for key in ("run.qqqq", *DEFAULTS["run"]))


def test_keys_that_are_not_text_are_refused():
    user_error(parse_recipe, {**recipe_content(), 1: 2})


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "0.00001", "+1e-5"])
def test_every_way_to_write_a_float_is_a_float(tmp_path, text):
    assert type(yaml.safe_load("1e-5")) is str  # YAML 1.1 alone would not do
    path = write(
        tmp_path / "r.yaml",
        "model: {adapter: sd3, path: tiny}\ndata: {prompts: p.txt}\nreward: [{name: shapes, weight: %s}]\n"
        "rollout: {noise_level: %s, shift: %s}\nupdate: {lr: %s, clip_range: %s, kl_weight: %s}\n" % ((text,) * 6),
    )
    recipe = load_recipe(path)
    rollout, update = recipe.rollout, recipe.update
    told = [recipe.reward[0].weight, rollout.noise_level, rollout.shift, update.lr, update.clip_range, update.kl_weight]
    assert told == [1e-5] * 6
    assert {type(value) for value in told} == {float}


def test_clip_range_may_be_a_low_and_a_high_one(tmp_path):
    path = write(tmp_path / "r.yaml", yaml.safe_dump(recipe_content()) + "update: {clip_range: [1e-4, 5e-4]}\n")
    assert load_recipe(path).update.clip_range == (1e-4, 5e-4)


def test_floats_are_accepted_in_overrides_and_in_the_options_of_a_reward(tmp_path):
    path = write(
        tmp_path / "r.yaml",
        "model: {adapter: sd3, path: tiny}\ndata: {prompts: p.txt}\nreward: [{name: http, scale: 1e-5}]\n",
    )
    recipe = load_recipe(path, ("update.lr=3e-4",))
    assert recipe.update.lr == 3e-4
    assert recipe.reward[0].model_extra["scale"] == 1e-5


@settings(max_examples=25)
@given(recipes(), st.sampled_from([1e-5, 2.5e-7, 0.1]), st.sampled_from([1e-4, [1e-5, 0.3]]))
def test_a_dumped_recipe_reads_back_as_the_same_recipe(recipe, lr, clip_range):
    content = recipe.model_dump(mode="json")
    content["update"] |= {"lr": lr, "clip_range": clip_range}
    content["reward"] = [{"name": "http", "weight": 0.5, "url": "http://localhost", "options": {"a": [1, 2.5, None]}}]
    content["model"]["path"] = "/models/größe: #1"
    recipe = parse_recipe(content)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_run_folders_recipe_loads_as_it_is(tmp_path):
    write(tmp_path / "recipes" / "prompts.txt", "a red circle")
    recipe = load_recipe(
        write(tmp_path / "recipes" / "mine.yaml", recipe_content(rollout={"tree": {}, "group_size": 16})),
        ("run.seed=9",),
    )
    resolved = write(tmp_path / "runs" / "mine" / "recipe.yaml", dump_recipe(recipe))
    assert load_recipe(resolved) == recipe


@pytest.mark.parametrize(
    "change", [{"rollout": {"steps": 9}}, {"rollout": {"window": {"size": 2}}}, {"run": {"seed": 1}}]
)
def test_dumps_of_different_recipes_differ(change):
    assert dump_recipe(parse_recipe(recipe_content(**change))) != dump_recipe(parse_recipe(recipe_content()))
