"""Hours of training in minutes: a run that goes on holds no more memory, threads or open files than it did (issue 15).

FLOWGROVE_SOAK_SECONDS is for how long each run is watched, 600 by default.
"""

import os
import signal
import statistics
import subprocess
import time
from pathlib import Path

import pytest

from engine_cases import metrics_of, tiny_recipe
from flowgrove.run.finding import valid_checkpoints
from flowgrove.run.manifest import verify
from rank_cases import TREE, wait_for_lines
from subprocesses import FLOWGROVE, environment
from torchrun import DEADLINE, process_of, started

SECONDS = float(os.environ.get("FLOWGROVE_SOAK_SECONDS", "600"))
WARMING = min(60.0, SECONDS / 3)  # caches fill, and every kind of pass has run
# Memory of a run moves: Python collects old garbage that holds itself when a quarter as many objects wait as live, and
# of a million that libraries leave a quarter is some 25 MB. A checkpoint is 15 MB, and ten minutes have hundreds
# of them: three that are kept are seen, and 10 kB of each iteration.
GROWTH = 32 * 2**20  # bytes of the median from the first third of what is measured to the last
ENDLESS = 100_000  # iterations


def soaking(folder):
    run = {"iterations": ENDLESS, "checkpoint_every": 5, "eval_every": 7, "keep_best": True, "keep_last": 2}
    update = {"ema_decay": 0.9, "kl_weight": 0.1}
    return tiny_recipe(folder, run={**run, "log": ["jsonl", "tensorboard"]}, rollout=TREE, update=update)


def held(process):
    """Resident bytes, threads, and open files of a process."""
    place = Path(f"/proc/{process}")
    found = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line)
    return int(found["VmRSS"].split()[0]) * 1024, int(found["Threads"]), len(list((place / "fd").iterdir()))


def watched(processes, alive):
    """What each of them holds, twice a second."""
    found = {process: [] for process in processes}
    until = time.monotonic() + SECONDS
    warm = time.monotonic() + WARMING
    while time.monotonic() < until:
        assert alive()
        if time.monotonic() > warm:
            for process, samples in found.items():
                samples.append(held(process))
        time.sleep(0.5)
    return found


def assert_flat(samples):
    """Between the first and the last third of the samples. Threads and files come and go with checkpoints, so that
    theirs is the fewest that there are in a third: one that is never closed raises it.
    """
    third = len(samples) // 3
    first, last = (list(zip(*part, strict=True)) for part in (samples[:third], samples[-third:]))
    memory = [int(statistics.median(part[0])) for part in (first, last)]
    threads, files = ([min(part[kind]) for part in (first, last)] for kind in (1, 2))
    told = f"{len(samples)} samples, memory {memory[0] / 2**20:.1f} → {memory[1] / 2**20:.1f} MiB, "
    told += f"threads {threads[0]} → {threads[1]}, files {files[0]} → {files[1]}"
    assert memory[1] - memory[0] < GROWTH, told
    assert threads[1] <= threads[0], told
    assert files[1] <= files[0], told
    print(told)
    return told


def assert_sound(run):
    """It has done a good deal, and what it has left is whole."""
    lines = metrics_of(run)
    assert [line["iteration"] for line in lines] == list(range(len(lines)))
    assert len(lines) > SECONDS / 10
    assert sum("eval_reward" in line for line in lines) == -(-len(lines) // 7)
    newest = valid_checkpoints(run)[-1]
    verify(newest)
    assert newest.name == f"step_{len(lines):06d}"


@pytest.mark.long
def test_one_process_stays_as_it_is(tmp_path, record_property):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*FLOWGROVE, "train", soaking(tmp_path), "--out", run]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(OMP_NUM_THREADS="1"), stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_lines(run, 1, process, log)
        (samples,) = watched([process.pid], lambda: process.poll() is None).values()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 128 + signal.SIGTERM, log.read_text()
    finally:
        process.kill()
        process.wait()
    told = assert_flat(samples)
    record_property("soak", f"{len(metrics_of(run))} iterations; {told}")
    assert_sound(run)


@pytest.mark.long
def test_each_of_two_ranks_stays_as_it_is(tmp_path, record_property):
    run, log = tmp_path / "run", tmp_path / "log"
    command = ("-m", "flowgrove", "train", soaking(tmp_path), "--set", "engine.distributed=ddp", "--out", run)
    with started(2, *command, output=log) as torchrun:
        wait_for_lines(run, 1, torchrun, log)
        processes = [process_of(rank, torchrun.pid) for rank in (0, 1)]
        found = watched(processes, lambda: torchrun.poll() is None)
        os.kill(processes[1], signal.SIGTERM)
        torchrun.wait(DEADLINE)
    told = [f"rank {rank}: {assert_flat(found[process])}" for rank, process in enumerate(processes)]
    record_property("soak", f"{len(metrics_of(run))} iterations; {'; '.join(told)}")
    assert_sound(run)
