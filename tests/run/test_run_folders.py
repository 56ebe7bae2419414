"""One run at a time in a folder, and what a run that is stopped leaves in it (issue 13, items 6 and 16)."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress

import pytest
import torch

from engine_cases import checkpoints, contents, metrics_of, refuse, succeed, timeless, tiny_recipe, weights_of
from flowgrove.errors import UserError
from flowgrove.recipe.loading import load_recipe
from flowgrove.run import stopping
from flowgrove.run.folder_lock import NAME, FolderLock
from flowgrove.run.metrics import read_metrics
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer
from flowgrove.update.updater import Updater
from subprocesses import PYTHON, environment

HOLD = """
import sys, time
from pathlib import Path
from flowgrove.run.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""
RUN = {"iterations": 4, "checkpoint_every": 0, "eval_every": 0, "log": ["jsonl"]}


@pytest.fixture
def holder(tmp_path):
    """Another process that has tmp_path/run."""
    with subprocess.Popen(
        [PYTHON, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


# The lock


def test_a_folder_in_use_is_refused_and_that_of_a_dead_process_taken_over(holder, tmp_path):
    recipe = tiny_recipe(tmp_path, run=RUN)
    before = contents(tmp_path / "run")
    line = refuse("train", recipe, "--out", tmp_path / "run")
    assert (
        f"{tmp_path / 'run'} is in use by another run, process {holder.pid} on {socket.gethostname()}: "
        "give another --out" in line
    )
    assert contents(tmp_path / "run") == before
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    FolderLock(tmp_path / "run").release()
    assert not (tmp_path / "run" / NAME).exists()


@pytest.mark.parametrize("seconds", [0, 60, 3600])
def test_a_run_on_another_host_counts_while_it_touches_its_file(tmp_path, seconds):
    lock = tmp_path / NAME
    lock.write_text(json.dumps({"host": "elsewhere", "process": 77}))
    os.utime(lock, (time.time() - seconds, time.time() - seconds))
    if seconds > 120:
        FolderLock(tmp_path).release()
        assert not lock.exists()
    else:
        with pytest.raises(
            UserError, match="process 77 on elsewhere: give another --out, or end that process, or wait 120 seconds"
        ):
            FolderLock(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"null", b'{"host": 3}' + b" " * 2000, b'{"process": -1}']
)
def test_a_damaged_lock_file_that_is_old_keeps_nobody_out(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    os.utime(tmp_path / NAME, (0, 0))
    lock = FolderLock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
    lock.release()


def test_a_file_system_without_locks_still_knows_its_own_processes(holder, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("flowgrove.run.folder_lock.fcntl.flock", unsupported)
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        FolderLock(tmp_path / "run")
    holder.kill()
    holder.wait()
    FolderLock(tmp_path / "run").release()


def test_a_run_that_was_taken_over_while_it_slept_writes_no_more(tmp_path):
    lock = FolderLock(tmp_path)
    lock.check()
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "process": 77}))
    with pytest.raises(UserError, match="was taken over by process 77 on elsewhere"):
        lock.check()
    lock.release()
    assert (tmp_path / NAME).exists()  # it is the other one's


def test_a_mistake_after_the_lock_leaves_no_folder_behind(tmp_path):
    recipe = tiny_recipe(tmp_path, run=RUN)
    refuse("train", recipe, "--set", f"model.path={tmp_path / 'gone'}", "--out", tmp_path / "a" / "b" / "run")
    assert not (tmp_path / "a").exists()


def test_a_finished_run_leaves_no_lock(tmp_path):
    recipe = tiny_recipe(tmp_path, run={**RUN, "iterations": 1})
    succeed("train", recipe, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / NAME).exists()


# Signals in this process


def test_a_signal_waits_for_the_measurement_of_gradients_too(tmp_path, monkeypatch):
    """It compares with the reference model, whose weights may stand in the policy's meanwhile."""
    seen, measured = [], Updater.gradient
    overrides = ("run.gradient_noise_every=1", "run.iterations=1", "run.eval_every=0")
    setup = Setup(load_recipe(tiny_recipe(tmp_path), overrides))
    with Stopping() as stop:
        monkeypatch.setattr(
            Updater, "gradient", lambda *given: seen.append((stop.holding, stop.let_go())) or measured(*given)
        )
        trainer = Trainer(setup, tmp_path / "run", "auto", stop, print)
        trainer.run(lambda line: None)
    assert seen
    assert {holding for holding, _ in seen} == {True}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts_what_may_be_thrown_away_and_waits_elsewhere(number, monkeypatch):
    monkeypatch.setattr(stopping, "_ONE_REQUEST", 0.05)
    before, left = signal.getsignal(number), []
    signal.signal(number, signal.default_int_handler)  # as in a terminal; under nohup it stays ignored
    try:
        with Stopping(left.append) as stop:
            with pytest.raises(Stopped) as caught:
                signal.raise_signal(number)
            assert caught.value.exit_code == 128 + number
        with Stopping(left.append) as stop:
            stop.hold()
            signal.raise_signal(number)
            signal.raise_signal(number)  # the same request, as a terminal that closes sends it twice
            assert left == []
            time.sleep(0.06)
            signal.raise_signal(number)
            assert left == [128 + number]
            with pytest.raises(Stopped):
                stop.let_go()
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_of_several_processes_only_a_second_interrupt_ends_one_at_once(first, monkeypatch):
    """torchrun may send a request twice, and a rank hears the second time as late as its kernels let it."""
    monkeypatch.setattr(stopping, "_ONE_REQUEST", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    before, left = {number: signal.getsignal(number) for number in stopping._SIGNALS}, []
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        with Stopping(left.append) as stop:
            stop.hold()
            for number in (first, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)
                time.sleep(0.01)
            assert left == []
            signal.raise_signal(signal.SIGINT)
            if first != signal.SIGINT:
                assert left == []
                time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)
            assert left == [128 + signal.SIGINT]
            with pytest.raises(Stopped) as caught:
                stop.let_go()
            assert caught.value.exit_code == 128 + first
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stopping():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Interrupting:
    """Stands for a reward: the signal comes while it scores iteration `at`."""

    def __init__(self, inner, at, error=None):
        self.inner, self.at, self.error, self.calls = inner, at, error, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *arguments, **named):
        self.calls += 1
        if self.calls == self.at + 1:
            if self.error is None:
                signal.raise_signal(signal.SIGTERM)
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:  # a reward that catches everything
                raise self.error from None
        return self.inner(*arguments, **named)


@pytest.mark.parametrize(
    ("error", "ranks", "ends_at_once"),
    [(ValueError(), "2", False), (ValueError(), "1", True), (Stopped(signal.SIGTERM), "2", True), (None, "2", True)],
)
def test_a_rank_that_tells_an_error_is_not_ended_by_torchrun_meanwhile(error, ranks, ends_at_once, monkeypatch):
    """torchrun ends all ranks when one has gone, which may be before the first has told why."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with suppress(ValueError, Stopped), Stopping():
            if error is not None:
                raise error
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) != ends_at_once
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [None, UserError("the reward failed")])
def test_a_run_stopped_while_it_draws_goes_on_to_the_same_bits(tmp_path, error):
    recipe = tiny_recipe(tmp_path, run=RUN)
    succeed("train", recipe, "--out", tmp_path / "whole")
    run = tmp_path / "run"
    with Stopping() as stop:
        trainer = Trainer(Setup(load_recipe(recipe)), run, stopping=stop)
        trainer.stages.rewards = Interrupting(trainer.rewards, 2, error)
        with pytest.raises(Stopped):
            trainer.run()
    assert stop.saved == run / "checkpoints" / "step_000002"
    assert checkpoints(run) == ["step_000002"]
    assert not (run / NAME).exists()
    succeed("train", recipe, "--out", run)
    assert timeless(metrics_of(run)) == timeless(metrics_of(tmp_path / "whole"))
    expected = weights_of(tmp_path / "whole", 4)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(run, 4).items())


def test_a_run_stopped_before_its_first_update_has_nothing_to_save(tmp_path):
    recipe = tiny_recipe(tmp_path, run=RUN)
    with Stopping() as stop:
        trainer = Trainer(Setup(load_recipe(recipe)), tmp_path / "run", stopping=stop)
        trainer.stages.rewards = Interrupting(trainer.rewards, 0)
        with pytest.raises(Stopped):
            trainer.run()
    assert stop.saved is None
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_stopped_while_it_evaluates_keeps_its_weights_and_not_their_averages(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        model={"lora": {"rank": 2, "alpha": 4}},
        update={"lr": 1e-3, "ema_decay": 0.5},
        run={**RUN, "iterations": 2, "checkpoint_every": 1},
    )
    succeed("train", recipe, "--out", tmp_path / "whole")
    run = tmp_path / "run"
    with Stopping() as stop:
        trainer = Trainer(
            Setup(load_recipe(recipe, ("run.eval_every=1", "run.checkpoint_every=0"))), run, stopping=stop
        )
        judges = trainer.rewards.of_evaluations
        trainer.rewards.__dict__["of_evaluations"] = Interrupting(judges, 1)  # in the second of them
        with pytest.raises(Stopped):
            trainer.run()
    assert stop.saved == run / "checkpoints" / "step_000001"
    for name in ("weights", "ema", "optimizer"):
        file = f"checkpoints/step_000001/{name}.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# In a process of its own

HOLDING = """
import os, signal, time
from flowgrove.run.stopping import Stopping
with Stopping() as stop:
    stop.hold()
    print("held", flush=True)
    time.sleep(600)
    time.sleep(600)
"""


def test_a_second_signal_ends_at_once():
    with subprocess.Popen(
        [PYTHON, "-c", HOLDING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGTERM)
        told = process.stderr.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    assert told == "SIGTERM: ends after this update and a checkpoint; once more ends at once\n"


@pytest.mark.long
def test_a_terminal_that_closes_saves_too(tmp_path):
    recipe = tiny_recipe(tmp_path, run={**RUN, "iterations": 10_000})
    run = tmp_path / "run"
    child, ours = pty.fork()
    if child == 0:
        os.execve(PYTHON, [PYTHON, "-c", LISTENING, "train", str(recipe), "--out", str(run)], environment())
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < 2 and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 10_000)
    os.close(ours)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (name,) = checkpoints(run)
    assert int(name[5:]) == len(read_metrics(run))


LISTENING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from flowgrove.cli import app
app()
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_a_signal_saves_and_tells(tmp_path, number):
    recipe = tiny_recipe(tmp_path, run={**RUN, "iterations": 10_000})
    run = tmp_path / "run"
    command = [PYTHON, "-c", LISTENING, "train", recipe, "--out", run]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        deadline = time.monotonic() + 120
        while len(read_metrics(run)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    (name,) = checkpoints(run)
    assert int(name[5:]) == len(read_metrics(run))
    assert f"saved {run / 'checkpoints' / name}: the same command goes on from it" in errors
    assert f"interrupted ({signal.Signals(number).name})" in errors
    assert "Traceback" not in errors
    assert not (run / NAME).exists()
