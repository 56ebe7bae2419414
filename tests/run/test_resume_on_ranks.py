"""Runs whose weights are divided among ranks go on: to the last bit on the same ranks, to rounding on any others, and
every command reads their checkpoints.
"""

import os
import shutil
import signal
import time

import pytest

from engine_cases import checkpoints, metrics_of, succeed, timeless, tiny_recipe
from flowgrove.run.finding import newest_checkpoint
from flowgrove.run.manifest import verify
from flowgrove.run.tensor_files import TensorFiles
from torchrun import DEADLINE, process_of, started, train

ITERATIONS = 4
KINDS = ("weights", "optimizer", "ema")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """All weights of the tiny model in float64, with averages; a checkpoint after 2 and 4 iterations."""
    return tiny_recipe(
        tmp_path_factory.mktemp("recipe"),
        model={"dtype": "fp64"},
        update={"lr": 1e-3, "ema_decay": 0.5},
        run={"iterations": ITERATIONS, "checkpoint_every": 2, "eval_every": 0},
    )


def go(mode, recipe, out, *options):
    """Trains in a mode: its ranks, and engine.distributed or none."""
    ranks, distributed = mode
    if distributed is None:
        succeed("train", recipe, "--out", out, *options)
    else:
        train(ranks, recipe, "--out", out, *options, output=out.with_suffix(".log"), distributed=distributed)
    return out


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run in one go, by mode."""
    done = {}

    def run(mode):
        if mode not in done:
            done[mode] = go(mode, recipe, tmp_path_factory.mktemp("whole") / "run")
            assert checkpoints(done[mode]) == ["step_000002", "step_000004"]
        return done[mode]

    return run


def half(run, folder):
    """What a kill after 3 iterations leaves."""
    copy = folder / "run"
    shutil.copytree(run, copy, symlinks=True, ignore=shutil.ignore_patterns("step_000004", "*.html", "*.png", "latest"))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:3]))
    (copy / "latest").symlink_to("checkpoints/step_000002")
    return copy


def farthest(run, other):
    """The largest difference of two runs' last checkpoints, weights, moments and averages; 0: the same bits."""
    found = 0.0
    for kind in KINDS:
        left, right = (TensorFiles(r / "checkpoints" / "step_000004", kind).read() for r in (run, other))
        assert set(left) == set(right)
        found = max(found, *((left[name] - right[name]).abs().max().item() for name in left))
    return found


ONE, DDP, FSDP, FSDP3 = (1, None), (2, "ddp"), (2, "fsdp2"), (3, "fsdp2")
SAMPLE = [(FSDP, ONE)]
ALL = [(before, after) for before in (ONE, DDP, FSDP) for after in (ONE, DDP, FSDP, (3, "ddp"), FSDP3)]


@pytest.mark.parametrize(
    ("before", "after"),
    [pytest.param(*each, id=str(each), marks=() if each in SAMPLE else pytest.mark.long) for each in ALL],
)
def test_a_run_goes_on_in_any_mode_on_any_number_of_ranks(whole, recipe, tmp_path, before, after):
    """And once more from what it then wrote."""
    run = go(after, recipe, half(whole(before), tmp_path))
    if before == after:
        assert farthest(run, whole(before)) == 0
        assert timeless(metrics_of(run)) == timeless(metrics_of(whole(before)))
    else:
        assert farthest(run, whole(before)) < 1e-10
        assert [line["reward"] for line in metrics_of(run)] == [line["reward"] for line in metrics_of(whole(before))]
    verify(run / "checkpoints" / "step_000004")


def test_each_rank_has_its_files_and_every_command_reads_them(whole, recipe, tmp_path):
    run = whole(FSDP)
    folder = run / "checkpoints" / "step_000004"
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors"))
    assert names == sorted(f"{kind}/rank_0000{rank}.safetensors" for kind in KINDS for rank in (0, 1))
    sizes = [(folder / "weights" / f"rank_0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert min(sizes) > max(sizes) / 2
    assert "weighted_sum" in succeed("eval", run).stdout
    succeed("sample", run, "--prompts", recipe.parent / "eval.txt", "--out", tmp_path / "samples")
    succeed("export", run, "--out", tmp_path / "pipeline")
    assert (tmp_path / "pipeline" / "model_index.json").exists()
    assert "finished" in succeed("train", recipe, "--out", run).stderr


@pytest.mark.long
def test_lora_layers_stay_whole_and_are_exported_without_a_model(recipe, tmp_path):
    options = ("--set", "model.lora={rank: 2, alpha: 4}", "--set", "run.iterations=1")
    run = go(FSDP, recipe, tmp_path / "run", *options)
    assert (run / "checkpoints" / "step_000001" / "weights.safetensors").exists()
    succeed("export", run, "--out", tmp_path / "lora")


@pytest.mark.long
def test_ranks_that_are_killed_go_on_from_a_whole_checkpoint(whole, recipe, tmp_path):
    """All at once, as by a machine that loses its power, whatever they are writing."""
    run = tmp_path / "run"
    arguments = ("-m", "flowgrove", "train", recipe, "--set", "engine.distributed=fsdp2", "--out", run)
    with started(2, *arguments, "--set", "run.checkpoint_every=1", output=tmp_path / "log") as process:
        until = time.monotonic() + DEADLINE
        while newest(run) is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        for rank in (0, 1):
            os.kill(process_of(rank, process.pid), signal.SIGKILL)
        process.wait(DEADLINE)
    assert newest(run) is not None
    go(FSDP, recipe, run)
    assert farthest(run, whole(FSDP)) == 0
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


SLOW = """
import time
from flowgrove.run import saving
write = saving.write_pieces
def slow(folder, kind, tensors, pieces, rank):
    if rank == 1:
        print("rank 1 writes", flush=True)
        time.sleep(600)
    return write(folder, kind, tensors, pieces, rank)
saving.write_pieces = slow
from flowgrove.cli import app
app()
"""


@pytest.mark.long
def test_a_rank_that_is_killed_while_it_writes_is_waited_for_by_nobody(recipe, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    run, log = tmp_path / "run", tmp_path / "log"
    options = ("--set", "engine.distributed=fsdp2", "--set", "run.iterations=1", "--out", run)
    with started(2, tmp_path / "slow.py", "train", recipe, *options, output=log) as process:
        until = time.monotonic() + DEADLINE
        while "rank 1 writes" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.kill(process_of(1, process.pid), signal.SIGKILL)
        process.wait(20)
    assert "another rank of this run has gone" in log.read_text()
    assert newest(run) is None


def newest(run):
    return newest_checkpoint(run) if (run / "checkpoints").is_dir() else None
