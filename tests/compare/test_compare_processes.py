"""The processes of a comparison, with stand-ins for what they train: memory, locks of others, logs, ends."""

import gc
import io
import signal
import subprocess
import weakref
from dataclasses import replace

import pytest
from rich.console import Console

from engine_cases import tiny_recipe
from flowgrove.compare import processes, worker
from flowgrove.compare.goal import Goal
from flowgrove.compare.runs import comparison_of
from flowgrove.errors import UserError
from flowgrove.recipe.loading import load_recipe
from flowgrove.run.stopping import Stopping
from subprocesses import PYTHON, environment


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def test_a_run_that_is_extended_has_one_model_at_a_time(recipe, tmp_path, monkeypatch):
    """The stand-in is a circle, as the trainer is: only the collector frees it."""
    made, alive = [], []

    class Circle:
        def __init__(self, setup, *_):
            alive.append(sum(one() is not None for one in made))
            made.append(weakref.ref(self))
            self.setup, self.self = setup, self

        def run(self):
            lines.extend(
                {"iteration": number, "seconds": {"rollout": 1.0}}
                for number in range(len(lines), self.setup.recipe.run.iterations)
            )

    lines = []
    monkeypatch.setattr(worker, "Trainer", Circle)
    monkeypatch.setattr(worker, "whole_lines", lambda *_: list(lines))
    monkeypatch.setattr(worker, "write_report", lambda *_: None)
    gc.disable()
    try:
        content = load_recipe(recipe).model_dump(mode="json")
        worker.train(content, tmp_path / "out", Goal("seconds", 5.0), Stopping())
    finally:
        gc.enable()
    assert alive == [0, 0]
    assert len(lines) == 5


def test_a_folder_that_an_earlier_process_still_has_is_waited_for(tmp_path, monkeypatch, capsys):
    holder = "import sys; from flowgrove.run.folder_lock import FolderLock as L; from pathlib import Path\n"
    holder += "lock = L(Path(sys.argv[1])); print(flush=True); input(); lock.release()"
    monkeypatch.setattr(worker, "_LOOK", 0.01)
    with subprocess.Popen(
        [PYTHON, "-c", holder, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
    ) as process:  # fmt: skip
        process.stdout.readline()
        monkeypatch.setattr(worker, "_WAIT", 0.05)
        with pytest.raises(UserError, match="is in use by another run"):
            worker._locked(tmp_path / "run")
        monkeypatch.setattr(worker, "_WAIT", 60.0)
        monkeypatch.setattr(worker.time, "sleep", lambda _: process.communicate(b"\n"))
        worker._locked(tmp_path / "run").release()
    assert capsys.readouterr().out.count("waits for up to 60 seconds: ") == 1


def test_a_failure_is_the_processs_own_and_not_one_of_an_earlier_start(recipe, tmp_path, monkeypatch):
    run = comparison_of([recipe], tmp_path / "out", seeds="1").runs[0]
    run.log.parent.mkdir(parents=True)
    run.log.write_text("error: of an earlier start\n", encoding="utf-8")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n${SAYS:-:}\nexit 2\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setattr(processes.sys, "executable", str(program))
    reasons = []
    for says in (":", "echo error: of this one"):
        monkeypatch.setenv("SAYS", says)
        one = processes._Worker(run, Goal("iterations", 2), None)
        one.process.wait()
        reasons.append(one.failure().reason)
    assert reasons == [f"its process ended with exit code 2: see {run.log}", "of this one"]
    assert run.log.read_text(encoding="utf-8") == "error: of an earlier start\nerror: of this one\n"


def test_an_error_ends_the_processes_before_it_is_told(recipe, tmp_path, monkeypatch):
    """Else the same command, given at once, would find their folders in use."""
    begun = []
    slow = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(0)))
print(flush=True)
signal.pause()
"""

    class Slow:
        def __init__(self, run, *_):
            self.run = run
            self.process = subprocess.Popen([PYTHON, "-c", slow], stdout=subprocess.PIPE)
            self.process.stdout.readline()
            begun.append(self.process)

        def end(self, number):
            assert number == signal.SIGTERM
            self.process.send_signal(number)

    def broken(*_):
        raise RuntimeError("broken")

    comparison = replace(comparison_of([recipe], tmp_path / "out", seeds="1,2"), goal=Goal("iterations", 2))
    monkeypatch.setattr(processes, "_Worker", Slow)
    monkeypatch.setattr(processes._Display, "count", broken)
    console = Console(file=io.StringIO())
    with pytest.raises(RuntimeError, match="broken"):
        processes.train_all(comparison, 2, 1, Stopping(), console, print, lambda: None)
    ended = [process.returncode for process in begun]  # without a poll: of those that were waited for
    for process in begun:
        process.kill()
        process.communicate()
    assert ended == [0, 0]
