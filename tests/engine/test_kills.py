"""Processes that are killed, stopped or slow: what becomes of the run, and of the other ranks (issue 15)."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from engine_cases import checkpoints, metrics_of, succeed, tiny_recipe
from flowgrove.run.manifest import verify
from killing import ALONE, STAGES
from rank_cases import CASES, MODES, assert_same, wait_for_lines, written
from subprocesses import environment, python
from torchrun import DEADLINE, process_of, started, started_by_hand, torchrun, train

SUPPORT = Path(__file__).parents[1] / "support"
KILLS, SEED = 30, 15
FULL = CASES["full fine-tuning, KL"]
QUIET = {"eval_every": 0}
BY_MODE = {"ddp": CASES["window, LoRA, KL"], "fsdp2": FULL}


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_nobody_disturbed(tmp_path, record_property):
    """To the last bit: weights, optimiser, averages, metrics, sample grids. Kills fall in every stage."""
    run = {"iterations": 4, "checkpoint_every": 1, "eval_every": 1, "keep_best": True, "keep_last": 2}
    recipe = tiny_recipe(tmp_path, update={"ema_decay": 0.9}, run=run)
    env = {"PYTHONPATH": os.pathsep.join([str(SUPPORT), environment()["PYTHONPATH"]]), "OMP_NUM_THREADS": "1"}
    program = python(SUPPORT / "killing.py", recipe, tmp_path, KILLS, SEED, env=env, timeout=1200, check=False)
    assert program.returncode == 0, program.stderr
    told = json.loads(program.stdout.splitlines()[-1])
    inside = {stage: sum(stage in where for _, where in told["fell"]) for stage in (*STAGES, ALONE)}
    fell = ", ".join(f"{stage} {count}" for stage, count in inside.items())
    record_property(
        "kills", f"{len(told['fell'])} in {told['starts']} starts of {told['runs']} runs; they fell in: {fell}"
    )
    print(told["fell"])
    assert told["differ"] == []
    assert len(told["fell"]) == KILLS
    assert all(inside[stage] for stage in STAGES), inside


# Rank 1 does something in a pass of the rollout or of an update of its third iteration or so
AMID = """
import os, signal, sys, time
from pathlib import Path
import torch
from flowgrove.cli import app
from flowgrove.models.policy import Policy

velocity, passes = Policy.velocity, [0]

def amid(self, *given):
    if os.environ["RANK"] == "1" and torch.is_grad_enabled() == {updating}:
        passes[0] += 1
        if passes[0] == 9:
            Path({told!r}).write_text(str(time.time()))
            {act}
    return velocity(self, *given)

Policy.velocity = amid
app(prog_name="flowgrove")
"""
STAGE = pytest.mark.parametrize("stage", ["rollout", "update"])


def amid(folder, stage, act):
    """The program; it writes into FOLDER/told when rank 1 acts."""
    file = folder / "amid.py"
    file.write_text(AMID.format(updating=stage == "update", told=str(folder / "told"), act=act))
    return file


def arguments(recipe, mode, out):
    sets = [word for key, value in MODES[mode].items() for word in ("--set", f"engine.{key}={str(value).lower()}")]
    return ["train", recipe, *sets, "--out", out]


@pytest.mark.long
@STAGE
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_ranks_that_nothing_watches_end_soon_after_one_of_them_is_killed(mode, stage, tmp_path):
    recipe = written(tmp_path, iterations=1000, run=QUIET, **BY_MODE[mode])
    program = amid(tmp_path, stage, "os.kill(os.getpid(), signal.SIGKILL)")
    options = arguments(recipe, mode, tmp_path / "run")
    with started_by_hand(3, program, *options, folder=tmp_path) as ranks:
        assert ranks[1].wait(DEADLINE) == -signal.SIGKILL, (tmp_path / "1.log").read_text()
        killed = float((tmp_path / "told").read_text())
        for rank in (0, 2):
            assert ranks[rank].wait(60) == 2
        assert time.time() - killed < 10
    text = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 2)]
    assert [one.count("error: ") for one in text] == [1, 1], text
    assert all("another rank of this run has gone" in one and "Traceback" not in one for one in text), text


@pytest.mark.long
@pytest.mark.parametrize(("mode", "stage"), [("ddp", "rollout"), ("fsdp2", "update")])
def test_ranks_of_torchrun_end_soon_after_one_of_them_is_killed(mode, stage, tmp_path):
    recipe = written(tmp_path, iterations=1000, run=QUIET, **BY_MODE[mode])
    program = amid(tmp_path, stage, "os.kill(os.getpid(), signal.SIGKILL)")
    options = arguments(recipe, mode, tmp_path / "run")
    text = torchrun(2, program, *options, output=tmp_path / "log", code=1)
    assert time.time() - float((tmp_path / "told").read_text()) < 10
    assert text.count("error: ") == text.count("another rank of this run has gone") == 1, text


@pytest.mark.long
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_stopped_rank_is_named_and_goes_on_with_the_others(mode, tmp_path):
    recipe = written(tmp_path, iterations=20, run=QUIET, **BY_MODE[mode])
    succeed("train", recipe, "--out", tmp_path / "one")
    log = tmp_path / "log"
    with started(2, "-m", "flowgrove", *arguments(recipe, mode, tmp_path / "run"), output=log) as process:
        wait_for_lines(tmp_path / "run", 2, process, log)
        stopped = process_of(1, process.pid)
        os.kill(stopped, signal.SIGSTOP)
        try:
            until = time.monotonic() + 30
            while "rank 1 has given no sign of life" not in log.read_text():
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert process.wait(DEADLINE) == 0, log.read_text()
    assert_same(tmp_path / "run", tmp_path / "one")


@pytest.mark.long
def test_a_reward_that_takes_forty_seconds_on_one_rank_ends_nobody(tmp_path):
    """In its second call: the first one is before training."""
    (tmp_path / "slow.py").write_text(
        "import os\nimport time\n\ncalls = []\n\n\ndef score(pictures, prompts):\n"
        "    calls.append(prompts)\n    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        time.sleep(40)\n    return [0.0] * len(prompts)\n"
    )
    reward = [{"name": "shapes"}, {"name": "python", "file": "slow.py"}]
    recipe = written(tmp_path, reward=reward, run=QUIET, **BY_MODE["ddp"])
    text = train(2, recipe, "--allow-python", "--out", tmp_path / "run", output=tmp_path / "log")
    assert max(line["seconds"]["reward"] for line in metrics_of(tmp_path / "run")) >= 40
    assert "sign of life" not in text
    assert "error" not in text


@pytest.mark.long
@STAGE
def test_an_error_on_one_rank_of_divided_weights_is_told_once(stage, tmp_path):
    recipe = written(tmp_path, iterations=1000, run=QUIET, **FULL)
    program = amid(tmp_path, stage, "raise ValueError('by mistake')")
    options = arguments(recipe, "fsdp2", tmp_path / "run")
    text = torchrun(2, program, *options, output=tmp_path / "log", code=1)
    assert time.time() - float((tmp_path / "told").read_text()) < 30
    assert text.count("error: ") == text.count("by mistake") == 1, text


@pytest.mark.long
def test_a_signal_to_one_rank_leaves_a_whole_checkpoint_of_divided_weights(tmp_path):
    recipe = written(tmp_path, iterations=10_000, run=QUIET, **FULL)
    out, log = tmp_path / "run", tmp_path / "log"
    with started(2, "-m", "flowgrove", *arguments(recipe, "fsdp2", out), output=log) as process:
        wait_for_lines(out, 2, process, log)
        os.kill(process_of(1, process.pid), signal.SIGTERM)
        process.wait(DEADLINE)
    (saved,) = checkpoints(out)
    assert int(saved[5:]) == len(metrics_of(out))
    verify(out / "checkpoints" / saved)
    assert len(list((out / "checkpoints" / saved / "weights").iterdir())) == 2
    assert log.read_text().count("the same command goes on from it") == 1
