"""Full disks and interruptions leave whole files behind."""

import errno
import os
import signal
import subprocess
import time

import pytest

from engine_cases import tiny_recipe
from flowgrove.files import write_file, write_text
from flowgrove.metrics import MetricsLog, read_metrics
from subprocesses import PYTHON, environment


def disk_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_write_that_fails_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def half(partial):
        partial.write_text("ha")
        disk_full()

    with pytest.raises(OSError, match="No space"):
        write_file(path, half)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_metrics_line_that_does_not_fit_is_cut_off_again(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, ["jsonl"], 0)
    log.write({"iteration": 0})
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        log.write({"iteration": 1})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 0}\n'
    log.write({"iteration": 1})
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [0, 1]


def test_interrupting_a_run_exits_with_130_and_keeps_the_last_checkpoint(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"iterations": 10_000, "checkpoint_every": 1, "eval_every": 0, "keep_last": 2, "log": ["jsonl"]})
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs start with SIGINT ignored
    command = [PYTHON, "-c", f"{heard}; from flowgrove.cli import app; app()", "train", str(recipe), "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as run:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "latest" / "state.json").is_file()
