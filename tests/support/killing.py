"""Kills a run of one process again and again, gives the same command again after each kill, and compares what comes
out with a run that nobody disturbed. A program: `python killing.py RECIPE FOLDER KILLS SEED`, which prints JSON.

Every start is a fork of one process that has imported everything and computed nothing, so that kills fall on work
instead of on imports. A third of the moments are moments of the clock; the rest are places: the n-th call or return of
Python code, n drawn from as many as the undisturbed run has there, inside each stage in turn.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine_cases import UNTIMED, metrics_of
from flowgrove import trainer
from flowgrove.cli import app
from flowgrove.report import page
from flowgrove.run import finding
from flowgrove.run.finding import pointed_at, valid_checkpoints
from flowgrove.run.manifest import verify
from flowgrove.run.metrics import MetricsLog
from flowgrove.run.saving import CheckpointWriter
from flowgrove.spans import Clock

STAGES = (
    "rollout", "reward", "credit", "update", "checkpoint", "removal", "metrics line", "evaluation", "sample grid",
    "best kept", "report",
)  # fmt: skip
ALONE = "elsewhere"  # between the stages of the loop, or before it
LONGEST = 120.0  # seconds that a start may take
OLD = 7200.0  # seconds by which what a kill leaves is made older
_flags = mmap(-1, len(STAGES))  # which stages a start is in, seen by whoever has forked it


class Watch:
    """What a start does when it enters a stage. `aim`: the stage, which time it is entered, and the number of the call
    or return in it at which the start tells `pipe` and stands still. With `counts` it notes how many there are.
    """

    def __init__(self, pipe=-1, aim=None, counts=None):
        self.pipe, self.aim, self.counts = pipe, aim, counts
        self.entered = dict.fromkeys(STAGES, 0)

    @contextmanager
    def __call__(self, stage):
        index, number = STAGES.index(stage), self.entered[stage]
        self.entered[stage] += 1
        aimed = self.aim is not None and self.aim[:2] == (stage, number)
        events = 0

        def note(*_):
            nonlocal events
            events += 1
            if aimed and events > self.aim[2]:
                os.write(self.pipe, b"x")
                time.sleep(LONGEST)

        _flags[index], before = 1, sys.getprofile()
        if aimed or self.counts is not None:
            sys.setprofile(note)
        try:
            yield
        finally:
            sys.setprofile(before)
            if self.counts is not None:
                self.counts.setdefault(stage, []).append(events)
            _flags[index] = 0


watch = Watch()


def within(owner, name, stage):
    original = getattr(owner, name)

    def call(*args, **kwargs):
        with watch(stage):
            return original(*args, **kwargs)

    setattr(owner, name, call)


def observe():
    """From now on stages tell `watch` of themselves, and a start that its loop begins."""
    timed, run = Clock.__call__, trainer.Trainer.run

    @contextmanager
    def timed_and_told(clock, stage):
        with timed(clock, stage):
            if stage in STAGES:
                with watch(stage):
                    yield
            else:
                yield

    def begun(self, *args):
        if watch.pipe >= 0:
            os.write(watch.pipe, b"b")
        return run(self, *args)

    Clock.__call__ = timed_and_told
    trainer.Trainer.run = begun
    within(CheckpointWriter, "_work", "checkpoint")
    within(finding, "remove", "removal")
    within(MetricsLog, "write", "metrics line")
    within(trainer, "evaluate", "evaluation")
    within(trainer, "save_grid", "sample grid")
    within(trainer.Trainer, "_keep_if_best", "best kept")
    within(page, "write_report", "report")


def started(recipe, run, log, after=lambda: None, **watching):
    """Forks a start of the command; returns its process, and the end of the pipe that it tells."""
    global watch
    for index in range(len(STAGES)):
        _flags[index] = 0
    reading, writing = os.pipe()
    process = os.fork()
    if process:
        os.close(writing)
        return process, reading
    code = 70
    try:
        os.close(reading)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        watch = Watch(writing, **watching)
        app(["train", str(recipe), "--out", str(run)], prog_name="flowgrove")
    except SystemExit as end:
        code = end.code or 0
        after()
    finally:
        os._exit(code)


def ended(process, log):
    """Waits for a start that nobody kills."""
    until = time.monotonic() + LONGEST
    while (found := os.waitpid(process, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    assert found[1] == 0, f"{found[1]}: {log.read_text()}"


def undisturbed(recipe, run, log):
    """Runs to the end in forks: once for what it imports, once for its calls and returns, and once for its time.
    Returns the calls and returns of each stage, the time it is entered after the time, and seconds.
    """
    told = run.with_name("told.json")
    for module in _told(recipe, run.with_name("first"), log, told, lambda: list(sys.modules)):
        if module in sys.modules or not module.partition(".")[0].isidentifier():
            continue
        try:
            __import__(module)
        except Exception:
            continue
    counts = {}
    _told(recipe, run.with_name("second"), log, told, lambda: counts, counts=counts)
    counts = json.loads(told.read_text())
    process, pipe = started(recipe, run, log)
    assert os.read(pipe, 1) == b"b"
    begun = time.monotonic()
    ended(process, log)
    os.close(pipe)
    return counts, time.monotonic() - begun


def _told(recipe, run, log, told, what, **watching):
    process, pipe = started(recipe, run, log, lambda: told.write_text(json.dumps(what())), **watching)
    ended(process, log)
    os.close(pipe)
    return json.loads(told.read_text())


def moments(rng, kills, counts, seconds):
    """Where to kill: places inside the stages in turn, and seconds after the loop has begun."""
    found = []
    for number in range(kills):
        if number % 3 == 2:
            found.append(("clock", rng.uniform(0, seconds / 2)))
            continue
        stage = STAGES[(number - number // 3) % len(STAGES)]
        entered = rng.randrange(min(2, len(counts[stage])))
        found.append((stage, entered, rng.randrange(counts[stage][entered])))
    rng.shuffle(found)
    return found


def kill(recipe, run, log, moment, rng):
    """Starts the command and kills it at this moment; returns in which stages it was, or None if it ended before."""
    clock = moment[0] == "clock"
    process, pipe = started(recipe, run, log, aim=None if clock else moment)
    told = os.read(pipe, 1)
    if clock and told:
        time.sleep(moment[1])
    elif told == b"b":
        told = os.read(pipe, 1)
        if moment[0] in ("checkpoint", "removal"):  # the training goes on beside it
            time.sleep(rng.uniform(0, 0.3))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(pipe)
    if not os.WIFSIGNALED(status):
        assert status == 0, f"{status}: {log.read_text()}"
        return None
    return [stage for stage, flag in zip(STAGES, _flags[:], strict=True) if flag] or [ALONE]


def check(run):
    """What may be in a run folder at any moment: what bears a checkpoint's name is one, and `latest` points to one."""
    for folder in valid_checkpoints(run):
        verify(folder)
    if (run / "latest").is_symlink():
        verify(pointed_at(run / "latest"))
    for left in run.rglob(".*.partial*"):
        old = time.time() - OLD
        os.utime(left, (old, old))


def same(run, whole):
    """What differs between what two runs have left, in words."""
    found = []
    names = [
        sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.name != ".lock") for one in (run, whole)
    ]
    if names[0] != names[1]:
        found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    lines = [[{k: v for k, v in line.items() if k not in UNTIMED} for line in metrics_of(one)] for one in (run, whole)]
    if lines[0] != lines[1]:
        found.append(f"metrics: {lines[0]} instead of {lines[1]}")
    for file in whole.rglob("*.safetensors"):
        left, right = load_file(run / file.relative_to(whole)), load_file(file)
        if list(left) != list(right) or not all(torch.equal(left[name], right[name]) for name in right):
            found.append(str(file.relative_to(whole)))
    for name in ("best.json", "recipe.yaml", *(str(file.relative_to(whole)) for file in whole.glob("samples/*"))):
        if (run / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    if (run / "latest").readlink() != (whole / "latest").readlink():
        found.append("latest")
    return found


def main(recipe, folder, kills, seed):
    """Prints which moments fell in which stages, and what differs after each run that has come to its end."""
    rng, log = random.Random(seed), folder / "log"
    assert len(os.listdir("/proc/self/task")) == 1  # what is forked has one thread
    observe()
    whole, begun = folder / "whole", time.monotonic()
    counts, seconds = undisturbed(recipe, whole, log)
    assert len(os.listdir("/proc/self/task")) == 1
    waiting, fell, differ, runs, starts = moments(rng, kills, counts, seconds), [], [], 0, 0
    while waiting:
        run = folder / f"run_{runs}"
        done = False
        while not done:
            starts += 1
            if waiting:
                where = kill(recipe, run, log, waiting[0], rng)
                done = where is None
                if not done:
                    fell.append((waiting.pop(0)[0], where))
                elif waiting[0][0] == "clock":  # too late for it
                    waiting[0] = ("clock", waiting[0][1] / 2)
            else:
                process, pipe = started(recipe, run, log)
                ended(process, log)
                os.close(pipe)
                done = True
            check(run)
        differ += [f"run {runs}: {what}" for what in same(run, whole)]
        runs += 1
    took = time.monotonic() - begun
    print(
        json.dumps({"fell": fell, "differ": differ, "runs": runs, "starts": starts, "seconds": took, "whole": seconds})
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
