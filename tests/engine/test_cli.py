"""The commands as a user meets them: what they print, what they leave on disk,
and one line for each mistake (DESIGN §3.3).
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from engine_cases import (
    EVAL_PROMPTS,
    TRAIN_PROMPTS,
    checkpoints,
    contents,
    error_line,
    flowgrove,
    metrics_of,
    refuse,
    strict_json,
    succeed,
    tiny_recipe,
    weights_of,
    write_lines,
)
from flowgrove.models.folders import TINY
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.grids import load_grid
from flowgrove.run.metric_keys import METRICS
from flowgrove_kernels import available_backends
from subprocesses import FLOWGROVE, environment

RECIPES = sorted(path.name for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml"))
NUMBERS = (
    "ratio_mean", "ratio_min", "ratio_max", "clipped_low", "clipped_high", "approx_kl", "grad_norm", "logp_drift",
    "rollout_forwards", "train_passes", "samples_per_second", "peak_memory_bytes",
)  # fmt: skip
ITERATIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def recipe(folder):
    run = {"iterations": ITERATIONS, "checkpoint_every": 2, "eval_every": 2, "gradient_noise_every": 3}
    return tiny_recipe(folder, run={**run, "log": ["jsonl", "tensorboard"]})


@pytest.fixture(scope="module")
def trained(folder, recipe):
    """What `train` printed; its run is folder/run."""
    return succeed("train", recipe, "--out", folder / "run")


@pytest.fixture
def run(folder, trained):
    return folder / "run"


def planned(*arguments):
    return strict_json(succeed("plan", *arguments, "--json").stdout)


# plan


def test_there_is_the_recipe_of_the_quickstart():
    assert "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_plan_prints_one_object_for_every_shipped_recipe(name):
    path = Path(__file__).parents[2] / "recipes" / name
    result = succeed("plan", path, "--json")
    told = strict_json(result.stdout)  # refuses anything beside one value
    assert set(told) == {"iteration", "window", "steps", "counts"}
    assert told["iteration"] == 0
    keys = {"index", "sigma", "sigma_next", "solver", "stochastic", "fanout", "trained", "nodes_in", "nodes_out"}
    assert all(set(step) in (keys, {*keys, "expert"}) for step in told["steps"])
    assert [step["index"] for step in told["steps"]] == list(range(len(told["steps"])))
    assert (told["steps"][0]["sigma"], told["steps"][-1]["sigma_next"]) == (1, 0)
    assert set(told["window"]) <= {step["index"] for step in told["steps"] if step["stochastic"]}
    assert not told["steps"][-1]["stochastic"]
    assert any(step["trained"] for step in told["steps"])
    counts, settings = told["counts"], load_recipe(path)
    assert set(counts) == {
        "leaves", "rollout_forwards", "edges", "trained_edges", "train_passes", "unshared_rollout_forwards",
        "unshared_train_passes",
    }  # fmt: skip
    assert counts["leaves"] == settings.rollout.group_size == told["steps"][-1]["nodes_out"]
    assert counts["rollout_forwards"] == sum(step["nodes_in"] for step in told["steps"])
    assert counts["edges"] == sum(step["nodes_out"] for step in told["steps"])
    assert counts["unshared_rollout_forwards"] == counts["leaves"] * len(told["steps"])
    assert counts["unshared_train_passes"] == counts["trained_edges"]
    assert 0 < counts["train_passes"] <= counts["trained_edges"]


def test_the_counts_are_those_of_the_mathematics(recipe):
    """MATH §5: T = 25, G = 12, a window of 4 at l = 10."""
    told = planned(
        recipe, "--iteration", 250, "--set", "rollout.steps=25", "--set", "rollout.group_size=12", "--set",
        "update.updates_per_iteration=4", "--set", "rollout.window={strategy: progressive, size: 4, every: 25}",
    )  # fmt: skip
    assert (told["iteration"], told["window"]) == (250, [10, 11, 12, 13])
    counts = told["counts"]
    assert (counts["rollout_forwards"], counts["edges"], counts["trained_edges"], counts["train_passes"]) == (
        11 + 12 * 14,
        300 - 110,
        48,
        40,
    )
    assert (counts["leaves"], counts["unshared_rollout_forwards"], counts["unshared_train_passes"]) == (12, 300, 48)


def test_the_iteration_moves_the_window(recipe):
    assert [planned(recipe, "--iteration", n)["window"] for n in range(4)] == [[0, 1], [1, 2], [0, 1], [1, 2]]


@pytest.mark.parametrize("tree", [None, "{splits: [0, 2], fanout: 3}"])
def test_plan_draws_steps_forest_and_counts(recipe, tree):
    options = (
        []
        if tree is None
        else ["--set", f"rollout.tree={tree}", "--set", "rollout.group_size=9", "--set", "rollout.steps=5"]
    )
    told, result = planned(recipe, *options), succeed("plan", recipe, *options)
    text = result.stdout
    assert result.stderr == ""
    assert text.count("●") == told["counts"]["leaves"]
    assert {step["solver"] for step in told["steps"]} == {"flow_sde", "ode"}
    lines = text.splitlines()
    for step in told["steps"]:
        (row,) = (
            line
            for line in lines
            if line.split()[:3] == [str(step["index"]), f"{step['sigma']:.4f}", f"{step['sigma_next']:.4f}"]
        )
        assert step["solver"] in row
        assert (f"×{step['fanout']}" in row) == (step["fanout"] > 1)
        assert ("yes" in row) == step["trained"]
        assert f" {step['nodes_in']} " in row
    for name in ("leaves", "rollout forwards", "edges", "trained edges", "train passes"):
        (row,) = (line for line in lines if line.startswith(f"{name} "))
        count = told["counts"][name.replace(" ", "_")]
        assert row.removeprefix(name).split()[:2] == [str(count), str(2 * count)]  # two prompts per iteration


def test_plan_loads_no_model(recipe):
    assert planned(recipe, "--set", "model.path=/no/such/model")["counts"]["leaves"] == 4


# train


def test_a_run_folder_holds_what_the_design_says(run):
    told = {path.name for path in run.iterdir()}
    assert {"recipe.yaml", "metrics.jsonl", "report.html", "samples", "checkpoints", "latest"} <= told
    assert any(name.endswith(".png") for name in told)
    assert checkpoints(run) == ["step_000002", "step_000004"]
    assert (run / "latest").resolve() == (run / "checkpoints" / "step_000004").resolve()
    assert {path.suffix for path in (run / "checkpoints" / "step_000004").iterdir()} == {".safetensors", ".json"}
    assert [path.name for path in (run / "samples").iterdir()] != []
    assert not [path for path in run.rglob("*") if "partial" in path.name]


def test_the_recipe_in_the_run_folder_is_resolved(run, recipe):
    given, kept = load_recipe(recipe), load_recipe(run / "recipe.yaml")
    assert kept.model_dump(exclude={"run"}) == given.model_dump(exclude={"run"})
    assert kept.run.iterations == ITERATIONS
    text = (run / "recipe.yaml").read_text()
    # defaults too
    assert all(
        f"{key}:" in text for key in ("noise_level", "shared_initial_noise", "adv_clip", "weight_decay", "keep_last")
    )
    assert str(recipe.parent / "train.txt") in text


def test_every_key_that_a_run_writes_is_explained_and_no_other(run):
    """Those of splits that a run chooses, and of a rollout.precision, are tested with such runs."""
    others = {"tree_splits", "split_evidence", "chosen_splits", "rollout_distance"}
    assert {key for line in metrics_of(run) for key in line} == {metric.key for metric in METRICS} - others


def test_every_metrics_line_has_the_keys_of_the_design(run, recipe):
    lines = metrics_of(run)
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS))
    for line in lines:
        assert all(isinstance(line[key], int | float) for key in NUMBERS)
        assert set(line["reward"]) == {"shapes"}
        assert 0 <= line["reward"]["shapes"]["mean"] <= 1
        assert line["reward"]["shapes"]["std"] >= 0
        assert line["ratio_min"] <= line["ratio_mean"] <= line["ratio_max"]
        assert all(0 <= line[key] <= 1 for key in ("clipped_low", "clipped_high"))  # shares, not sums over micro-steps
        assert {"plan", "rollout", "reward", "credit", "update"} <= set(line["seconds"])
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert line["samples_per_second"] > 0
        assert line["peak_memory_bytes"] > 1e7
        assert line["grad_norm"] > 0
        counts = planned(recipe, "--iteration", line["iteration"])["counts"]
        assert line["rollout_forwards"] == 2 * counts["rollout_forwards"]
        assert 0 < line["train_passes"] <= 2 * counts["train_passes"]


def test_held_out_reward_is_on_the_first_and_the_last_line_and_every_eval_every(run):
    lines = metrics_of(run)
    assert [line["iteration"] for line in lines if "eval_reward" in line] == [0, 2, 3]
    assert all(0 <= line["eval_reward"] <= 1 for line in lines if "eval_reward" in line)
    names = sorted(path.name for path in (run / "samples").glob("*.png"))
    assert len(names) == 3
    before, after = load_grid(run / "samples" / names[0]), load_grid(run / "samples" / names[-1])
    assert before.prompts == after.prompts == list(EVAL_PROMPTS)
    assert before.scores.mean() == pytest.approx(lines[0]["eval_reward"])
    assert after.scores.mean() == pytest.approx(lines[-1]["eval_reward"])
    for line, grid in ((lines[0], before), (lines[-1], after)):  # of two prompts the deviation is their distance / √2
        first, second = grid.scores.mean(1)
        width = 1.96 * abs(first - second) / 2
        assert line["eval_reward_confidence"] == pytest.approx(width)
        assert line["eval_rewards"] == {"shapes": pytest.approx({"mean": line["eval_reward"], "confidence": width})}


def test_training_prints_a_line_per_iteration_and_where_the_report_is(trained, run):
    assert trained.stdout == ""
    printed = [line for line in trained.stderr.splitlines() if line.strip()]
    assert [line.split()[0] for line in printed] == ["0", "1", "2", "3", "report:"]
    for line, shown in zip(metrics_of(run), printed, strict=False):
        assert f"{line['reward']['shapes']['mean']:.3f}" in shown
        assert ("held-out" in shown) == ("eval_reward" in line)
        assert f"{line['rollout_forwards']}+{line['train_passes']}" in shown
    assert str(run / "report.html") in printed[-1]


def test_tensorboard_gets_the_numbers_of_every_iteration(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = metrics_of(run)
    for name, key in (("ratio_mean", "ratio_mean"), ("grad_norm", "grad_norm"), ("eval_reward", "eval_reward")):
        expected = [(line["iteration"], line[key]) for line in lines if key in line]
        assert [(event.step, event.value) for event in events.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in expected
        ]


def test_evaluation_can_be_switched_off(tmp_path):
    succeed("train", tiny_recipe(tmp_path, run={"iterations": 1, "eval_every": 0}), "--out", tmp_path / "run")
    (line,) = metrics_of(tmp_path / "run")
    assert "eval_reward" not in line


def test_without_evaluation_prompts_there_is_no_evaluation(tmp_path):
    recipe = tiny_recipe(tmp_path, data={"eval_prompts": None}, run={"iterations": 1, "checkpoint_every": 0})
    succeed("train", recipe, "--out", tmp_path / "run")
    (line,) = metrics_of(tmp_path / "run")
    assert "eval_reward" not in line
    assert checkpoints(tmp_path / "run") == ["step_000001"]  # checkpoint_every 0: only the last


def test_the_run_folder_is_named_after_the_recipe_unless_told(tmp_path, monkeypatch):
    recipe = tiny_recipe(tmp_path / "recipes", run={"iterations": 1, "eval_every": 0})
    monkeypatch.chdir(tmp_path)
    succeed("train", recipe)
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").is_file()


# sample


def pictures_in(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_a_run_draws_with_its_newest_weights_and_a_recipe_with_the_base_model(run, recipe, tmp_path):
    """The evaluation's prompts give the evaluation's pictures: before the first update, and after the last."""
    prompts = write_lines(tmp_path / "p.txt", EVAL_PROMPTS)
    grids = [load_grid(path).tiles for path in sorted((run / "samples").glob("*.png"))]
    assert not np.array_equal(grids[0], grids[-1])
    for source, grid in ((recipe, grids[0]), (run, grids[-1])):
        result = succeed("sample", source, "--prompts", prompts, "--out", tmp_path / source.stem)
        assert str(tmp_path / source.stem) in result.stderr
        drawn = pictures_in(tmp_path / source.stem)
        assert list(drawn) == ["0000_0.png", "0001_0.png"]
        assert all(np.array_equal(picture, grid[number, 0]) for number, picture in enumerate(drawn.values()))


def test_prompts_of_samples_stand_in_the_column_that_the_recipe_names(recipe, tmp_path):
    write_lines(tmp_path / "p.csv", ["caption,mine", f"a photo,{TRAIN_PROMPTS[0]}"])
    shared = ("sample", recipe, "--prompts", tmp_path / "p.csv", "--set", "run.eval={samples: 1, steps: 2}", "--set")
    succeed(*shared, "data.prompt_key=mine", "--out", tmp_path / "out")
    line = strict_json((tmp_path / "out" / "prompts.jsonl").read_text(encoding="utf-8"))
    assert line["prompt"] == TRAIN_PROMPTS[0]
    assert "write data.prompt_key: one of caption, mine" in refuse(
        *shared, "data.prompt_key=other", "--out", tmp_path / "no"
    )


def test_samples_of_many_prompts_are_numbered_and_listed(recipe, tmp_path):
    prompts = write_lines(tmp_path / "p.txt", TRAIN_PROMPTS * 4)  # more than one batch of prompts
    for name in ("first", "second"):
        succeed(
            "sample", recipe, "--prompts", prompts, "--out", tmp_path / name, "--set", "run.eval={samples: 2, steps: 2}"
        )
    drawn = pictures_in(tmp_path / "first")
    assert list(drawn) == [f"{prompt:04d}_{sample}.png" for prompt in range(20) for sample in range(2)]
    assert {picture.shape for picture in drawn.values()} == {(32, 32, 3)}
    # the same sentence at another place in the file has noise of its own
    assert len({picture.tobytes() for picture in drawn.values()}) == 40
    again = pictures_in(tmp_path / "second")
    assert all(np.array_equal(drawn[name], again[name]) for name in drawn)
    listed = [
        strict_json(line) for line in (tmp_path / "first" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [entry["file"] for entry in listed] == list(drawn)
    assert [entry["prompt"] for entry in listed] == [prompt for prompt in TRAIN_PROMPTS * 4 for _ in range(2)]


# export


def test_an_exported_run_loads_as_a_pipeline_with_the_trained_weights(run, tmp_path):
    result = succeed("export", run, "--out", tmp_path / "pipe")
    assert f'StableDiffusion3Pipeline.from_pretrained("{tmp_path / "pipe"}")' in result.stderr
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipe", dtype=torch.float32)
    found, trained = pipe.transformer.state_dict(), weights_of(run, ITERATIONS)
    assert trained
    assert all(torch.equal(found[name], weight) for name, weight in trained.items())
    base = SD3Transformer2DModel.from_pretrained(TINY / "transformer", dtype=torch.float32).state_dict()
    changed = [name for name, weight in trained.items() if not torch.equal(base[name], weight)]
    assert len(changed) > len(trained) / 2
    assert all(torch.equal(found[name], base[name]) for name in base if name not in trained)


def test_an_exported_lora_loads_into_the_base_pipeline(tmp_path):
    recipe = tiny_recipe(tmp_path, model={"lora": {"rank": 2, "alpha": 4}}, update={"lr": 1e-2}, run={"iterations": 1})
    succeed("train", recipe, "--out", tmp_path / "run")
    result = succeed("export", tmp_path / "run", "--out", tmp_path / "lora")
    assert f'pipe.load_lora_weights("{tmp_path / "lora"}")' in result.stderr
    assert [path.suffix for path in (tmp_path / "lora").iterdir()] == [".safetensors"]
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "lora")
    found = {
        name.replace(".default_0.", ".default."): p
        for name, p in pipe.transformer.named_parameters()
        if "lora_" in name
    }
    trained = weights_of(tmp_path / "run", 1)
    assert set(found) == set(trained)
    # alpha / rank: in the file alpha is the rank
    strength = {name: 2.0 if "lora_B" in name else 1.0 for name in trained}
    assert all(torch.equal(found[name], strength[name] * weight) for name, weight in trained.items())
    assert any(bool((weight != 0).any()) for name, weight in trained.items() if "lora_B" in name)


# Earlier checkpoints


def test_an_earlier_checkpoint_is_drawn_scored_and_exported(run, recipe, tmp_path):
    """By number, by path and as a link; the pictures of the evaluation before iteration 2
    are those of the checkpoint.
    """
    prompts = write_lines(tmp_path / "p.txt", EVAL_PROMPTS)
    grid = load_grid(run / "samples" / "iteration_000002.png")
    earlier = run / "checkpoints" / "step_000002"
    for number, which in enumerate(("2", earlier)):
        succeed("sample", run, "--prompts", prompts, "--out", tmp_path / f"out{number}", "--checkpoint", which)
        assert all(
            np.array_equal(p, grid.tiles[n, 0]) for n, p in enumerate(pictures_in(tmp_path / f"out{number}").values())
        )
    succeed("sample", recipe, "--prompts", prompts, "--out", tmp_path / "by_recipe", "--checkpoint", earlier)
    assert pictures_in(tmp_path / "by_recipe").keys() == pictures_in(tmp_path / "out0").keys()
    shutil.copytree(run, tmp_path / "run")  # eval writes into it
    told = succeed("eval", tmp_path / "run", "--checkpoint", "2").stdout
    assert f"{grid.scores.mean():.4f}" in told
    succeed("export", run, "--out", tmp_path / "pipe", "--checkpoint", "2", "--set", "engine.attention=sdpa")
    found = SD3Transformer2DModel.from_pretrained(tmp_path / "pipe" / "transformer", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in weights_of(run, 2).items())


@pytest.mark.parametrize(
    ("which", "hint"), [("3", "give 2 or 4"), ("best", "run.keep_best"), ("/gone", "/gone"), ("", "not a checkpoint")]
)
def test_a_checkpoint_that_is_not_there_is_one_line(run, recipe, tmp_path, which, hint):
    for command in ("sample", "export", "eval"):
        options = ["--out", tmp_path / "out"] if command != "eval" else []
        options += ["--prompts", recipe.parent / "eval.txt"] if command == "sample" else []
        assert hint in refuse(command, run, *options, "--checkpoint", which)
    assert not (tmp_path / "out").exists()
    for source in ("2", "best"):
        line = refuse(
            "sample", recipe, "--prompts", recipe.parent / "eval.txt", "--out", tmp_path / "out", "--checkpoint", source
        )
        assert "is no run folder" in line


# doctor


def test_doctor_says_what_there_is():
    text = succeed("doctor").stdout
    facts = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert torch.__version__ in facts["torch"]
    assert "present" in facts["embedded"]
    assert all(name in text for name in (*available_backends(), "diffusers", "transformers"))
    assert "none" in facts["gpu"] or torch.cuda.is_available()
    assert "tensorboard" in facts["trackers"]


# Mistakes


def test_unknown_keys_name_the_nearest(recipe):
    assert "iterations" in refuse("train", recipe, "--set", "run.iteratons=3").replace("iteratons", "")
    assert "window" in refuse("plan", recipe, "--set", "rollout.windw={size: 2}").replace("windw", "")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_recipe_that_is_not_there(command, tmp_path):
    assert "nowhere.yaml" in refuse(command, tmp_path / "nowhere.yaml")
    assert str(tmp_path) in refuse(command, tmp_path)  # a folder


OVERRIDES = [
    "run.iterations",
    "=3",
    "run.iterations=[1",
    "run.iterations=many",
    "run=3",
    "reward=shapes",
    "rollout.steps=1",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides_that_mean_nothing(recipe, override, tmp_path):
    assert override.split("=")[0].split(".")[0] in refuse("train", recipe, "--set", override, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


BAD_MODELS = {
    "gone": None,
    "empty": {},
    "broken": {"model_index.json": "{"},
    "bare": {"model_index.json": '{"_class_name": "X"}'},
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_path_that_holds_no_pipeline(recipe, name, tmp_path):
    if BAD_MODELS[name] is not None:
        (tmp_path / name).mkdir()
        for file, text in BAD_MODELS[name].items():
            (tmp_path / name / file).write_text(text)
    line = refuse("train", recipe, "--set", f"model.path={tmp_path / name}", "--out", tmp_path / "run")
    assert "model.path" in line
    assert str(tmp_path / name) in line


REWARDS = [
    "[{name: shaps}]",
    "[{name: shapes, size: 3}]",
    "[{name: shapes}, {name: shapes}]",
    "[{name: jpeg_size, quality: sharp}]",
    "[]",
]


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_that_do_not_exist(recipe, reward, tmp_path):
    assert "reward" in refuse("train", recipe, "--set", f"reward={reward}", "--out", tmp_path / "run")


BAD_PROMPTS = {"empty": b"\n \n", "latin1": "ein grüner Kreis\n".encode("latin-1"), "dog": b"a photo of a dog\n"}


@pytest.mark.parametrize("key", ["data.prompts", "data.eval_prompts"])
@pytest.mark.parametrize("name", ["gone", *BAD_PROMPTS])
def test_prompts_that_cannot_be_used(recipe, key, name, tmp_path):
    if name in BAD_PROMPTS:
        (tmp_path / name).write_bytes(BAD_PROMPTS[name])
    line = refuse("train", recipe, "--set", f"{key}={tmp_path / name}", "--out", tmp_path / "run")
    assert ("a photo of a dog" if name == "dog" else str(tmp_path / name)) in line


def test_sampling_needs_a_file_of_prompts(run, tmp_path):
    assert "gone.txt" in refuse("sample", run, "--prompts", tmp_path / "gone.txt", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resume_never_leaves_a_run_alone(run, recipe):
    before = contents(run)
    assert "--resume" in refuse("train", recipe, "--out", run, "--resume", "never")
    assert contents(run) == before


def test_resuming_from_a_folder_that_is_no_checkpoint(recipe, tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        assert str(path) in refuse("train", recipe, "--out", tmp_path / "run", "--resume", path)


@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_folder_without_a_run_has_no_model(command, recipe, tmp_path):
    prompts = ["--prompts", recipe.parent / "eval.txt"] if command == "sample" else []
    (tmp_path / "bare").mkdir()
    for source in ("bare", "gone"):
        assert source in refuse(command, tmp_path / source, *prompts, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_reached_a_checkpoint_has_no_model(run, recipe, tmp_path):
    shutil.copytree(run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints", "latest"))
    assert "checkpoint" in refuse(
        "sample", tmp_path / "young", "--prompts", recipe.parent / "eval.txt", "--out", tmp_path / "out"
    )


def test_export_does_not_write_into_a_folder_that_holds_something(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert str(tmp_path) in refuse("export", run, "--out", tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("command", ["train", "sample", "export"])
def test_a_file_where_a_folder_should_go(command, run, recipe, tmp_path):
    (tmp_path / "taken").write_text("mine")
    source = recipe if command == "train" else run
    prompts = ["--prompts", recipe.parent / "eval.txt"] if command == "sample" else []
    assert "taken" in refuse(command, source, *prompts, "--out", tmp_path / "taken")
    assert contents(tmp_path) == {"taken": b"mine"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(recipe, tmp_path):
    assert "engine.device" in refuse("train", recipe, "--set", "engine.device=cuda", "--out", tmp_path / "run")


def test_a_backend_that_is_not_there(recipe, tmp_path):
    missing = [name for name in ("triton", "cuda", "cpu") if name not in available_backends()]
    if not missing:
        pytest.skip("every backend is here")
    line = refuse("train", recipe, "--set", f"engine.backend={missing[0]}", "--out", tmp_path / "run")
    assert "backend" in line
    assert missing[0] in line


def test_nothing_to_train_is_an_error(recipe, tmp_path):
    options = ["--set", "rollout.window.strategy=none", "--set", "rollout.shared_initial_noise=false"]
    assert "window" in refuse("train", recipe, *options, "--out", tmp_path / "run")


@pytest.mark.parametrize("name", ["[best].yaml", "[/best].yaml"])
def test_names_in_brackets_are_shown_as_they_are_in_errors(name, tmp_path):
    """Rich takes [best] for a style and [/best] for its end."""
    assert name in refuse("plan", tmp_path / name)


@pytest.mark.parametrize("name", ["pictures [best]", "pictures [/best]"])
def test_names_in_brackets_are_shown_as_they_are_in_messages(recipe, name, tmp_path):
    result = succeed(
        "sample", recipe, "--prompts", recipe.parent / "eval.txt", "--out", tmp_path / name, "--set", "run.eval.steps=2"
    )
    assert name in result.stderr
    assert (tmp_path / name / "0000_0.png").is_file()


# In a process of its own: exit code, stdout and stderr as a shell sees them


def in_a_shell(*arguments):
    command = [*FLOWGROVE, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment(COLUMNS="20")
    )


SLIPS = [
    ("plan", "gone.yaml"),
    ("plan", "mine.yaml", "--set", "run.iteratons=3"),
    ("plan", "mine.yaml", "--set", "nonsense"),
]


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip[-1])
def test_a_shell_sees_one_line_and_exit_code_2(recipe, slip):
    command, name, *options = slip
    result = in_a_shell(command, recipe.parent / name, *options)
    assert result.returncode == 2
    assert slip[-1].split("=")[0] in error_line(result.stdout, result.stderr)


def test_a_shell_can_pipe_the_plan(recipe):
    result = in_a_shell("plan", recipe, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert strict_json(result.stdout) == planned(recipe)


def test_help_names_the_commands():
    text = flowgrove("--help").stdout
    assert all(name in text for name in ("train", "plan", "recipe", "metrics", "sample", "compare", "export", "tune"))
