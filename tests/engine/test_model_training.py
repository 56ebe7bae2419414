"""Every algorithm trains every model family for three iterations; what runs leave behind serves sampling and export."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from engine_cases import metrics_of, refuse, succeed, write_lines
from flowgrove.models.experts import expert_of
from flowgrove.models.policy import Policy
from flowgrove.recipe.loading import load_recipe
from flowgrove.report.samples import write_samples
from flowgrove.report.video import write_mp4
from flowgrove.setup import Setup
from model_recipes import ALGORITHMS, write_recipe
from policy_cases import CPU
from tiny_families import FAMILIES, crossed

SAMPLED = ("mix_flash", "branch_mix")  # make test runs these of the swept families, make test-long all


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        *crossed([(algorithm,) for algorithm in SAMPLED], [("branch_mix",)]),
        *(
            pytest.param(name, algorithm, marks=pytest.mark.long)
            for name in FAMILIES
            for algorithm in ALGORITHMS
            if algorithm not in SAMPLED
        ),
    ],
)
def test_three_iterations(folders, tmp_path, name, algorithm):
    lora = {"rank": 4, "alpha": 8} if algorithm.startswith("branch") else None
    recipe = write_recipe(tmp_path, name, folders[name], algorithm, guidance_scale=FAMILIES[name].guidance, lora=lora)
    before = {key: p.detach().clone() for key, p in Policy.load(load_recipe(recipe), CPU).weights.trainable().items()}
    succeed("train", recipe, "--out", tmp_path / "run", "--set", "update.updates_per_iteration=1")
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 3
    for line in lines:
        assert line["train_passes"] > 0
        assert line["logp_drift"] <= 5e-7
        assert line["grad_norm"] > 0
    first = lines[0]
    assert (
        first["ratio_mean"],
        first["ratio_min"],
        first["ratio_max"],
        first["clipped_high"],
        first["clipped_low"],
    ) == (1, 1, 1, 0, 0)
    from flowgrove.run.finished_runs import open_model, open_recipe

    after = open_model(*open_recipe(tmp_path / "run")).restore().policy.weights.trainable()
    moved = [key for key, p in after.items() if not torch.equal(p, before[key])]
    plans = map(Setup(load_recipe(recipe)).plan, range(3))
    trained = {step.expert for plan in plans for step in plan.trained_steps}
    own = [key for key in before if expert_of(key)[0] in trained]  # an expert without a trained step stays as it is
    heard = [key for key in own if not re.fullmatch(FAMILIES[name].silent, key)]
    assert len(moved) > 0.9 * len(heard) > 0
    assert set(moved) <= set(own)


def test_a_video_run_samples_compares_and_exports(folders, tmp_path):
    av = pytest.importorskip("av")
    recipe = write_recipe(tmp_path, "wan", folders["wan"], "mix", lora={"rank": 4, "alpha": 8})
    run, out = tmp_path / "run", tmp_path / "samples"
    succeed("train", recipe, "--out", run, "--set", "run.eval_every=1", "--set", "run.eval.samples=2")
    assert (run / "samples" / "iteration_000003.png").is_file()
    prompts = write_lines(tmp_path / "new.txt", ["a red circle at the centre", "a blue square"])
    succeed("sample", run, "--prompts", prompts, "--out", out, "--compare")
    names = {path.name for path in out.iterdir()}
    videos = {
        f"{prompt:04d}_{sample}{kind}.mp4" for prompt in range(2) for sample in range(2) for kind in ("", "_base")
    }
    assert names == videos | {"prompts.jsonl", "prompts_base.jsonl", "compare_00.png"}
    for name in videos:
        with av.open(str(out / name)) as file:
            stream = file.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
            assert stream.average_rate == 16
        assert np.stack(frames).shape == (5, 32, 32, 3)
    assert Image.open(out / "compare_00.png").width > 500
    told = succeed("export", run, "--out", tmp_path / "lora")
    assert "pipe.load_lora_weights" in told.stderr
    FAMILIES["wan"].pipeline.from_pretrained(folders["wan"]).load_lora_weights(tmp_path / "lora")


def test_mp4_holds_the_frames_in_order_and_odd_sizes(tmp_path):
    av = pytest.importorskip("av")
    frames = np.zeros((7, 33, 47, 3), np.uint8)
    for index, frame in enumerate(frames):
        frame[:, :, index % 3] = 40 + 30 * index
    write_mp4(tmp_path / "a.mp4", frames, 8)
    with av.open(str(tmp_path / "a.mp4")) as file:
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert read.shape == (7, 34, 48, 3)
    assert np.abs(read[:, :33, :47].mean((1, 2)) - frames.mean((1, 2))).max() < 8


def test_tuned_share_0_draws_the_base_model_and_1_the_trained_one(folders, tmp_path):
    recipe = write_recipe(tmp_path, "flux_schnell", folders["flux_schnell"], "mix")
    succeed("train", recipe, "--out", tmp_path / "run", "--set", "update.lr=0.03")
    pictures = {}
    for share in (0, 0.5, 1):
        write_samples(tmp_path / "run", (f"run.eval.tuned_share={share}",), ["a red circle"], tmp_path / str(share))
        pictures[share] = np.asarray(Image.open(tmp_path / str(share) / "0000_0.png")).astype(int)
    write_samples(recipe, (), ["a red circle"], tmp_path / "base")
    base = np.asarray(Image.open(tmp_path / "base" / "0000_0.png")).astype(int)
    assert np.abs(pictures[0] - base).max() <= 1
    differences = [np.abs(pictures[share] - base).mean() for share in (0.5, 1)]
    assert min(differences) > 0.5
    assert differences[0] < differences[1]


def test_comparing_a_recipe_is_refused(folders, tmp_path):
    recipe = write_recipe(tmp_path, "flux", folders["flux"], "mix")
    prompts = write_lines(tmp_path / "new.txt", ["a red circle"])
    assert "--compare" in refuse("sample", recipe, "--prompts", prompts, "--out", tmp_path / "out", "--compare")
