"""Full disks and interruptions leave whole files behind."""

import errno
import os
import signal
import stat
import subprocess
import time

import pytest

from engine_cases import succeed, tiny_recipe
from flowgrove.files import partial_name, remove_left_behind, write_file, write_text
from flowgrove.run.metrics import MetricsLog, read_metrics
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


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The second begins and ends while the first writes: the later one wins, and both names are gone."""
    path = tmp_path / "cache.json"

    def first(partial):
        partial.write_text("first")
        write_text(path, "second")
        assert path.read_text() == "second"
        assert partial.read_text() == "first"

    write_file(path, first)
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["cache.json"]


def test_what_killed_writers_have_left_goes_after_an_hour(tmp_path):
    for path, age in (
        (partial_name(tmp_path / "report.html"), 7200),
        (partial_name(tmp_path / "eval.json"), 60),
        (tmp_path / ".mine.partial", 7200),
    ):
        path.write_text("half")
        os.utime(path, (time.time() - age, time.time() - age))
    remove_left_behind(tmp_path)
    left = sorted(os.listdir(tmp_path))
    assert len(left) == 2
    assert left[0].startswith(".eval.")
    assert left[1] == ".mine.partial"


def test_a_file_of_the_longest_name_can_be_written(tmp_path):
    write_text(tmp_path / ("a" * 240 + ".json"), "{}")
    assert len(os.listdir(tmp_path)) == 1


def test_an_export_leaves_what_the_user_keeps_beside_it(tmp_path):
    recipe = tiny_recipe(tmp_path, model={"lora": {"rank": 2, "alpha": 4}}, run={"iterations": 1, "eval_every": 0})
    succeed("train", recipe, "--out", tmp_path / "run")
    (tmp_path / "lora.partial").mkdir()
    (tmp_path / "lora.partial" / "mine.txt").write_text("mine")
    before = os.umask(0o022)
    try:
        succeed("export", tmp_path / "run", "--out", tmp_path / "lora")
    finally:
        os.umask(before)
    assert (tmp_path / "lora.partial" / "mine.txt").read_text() == "mine"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "lora").iterdir()} == {0o644}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_bad_line_costs_no_other_and_no_line_stands_twice(tmp_path):
    """What a resumed run keeps of a file that others wrote to."""
    texts = [
        '{"iteration": 0}',
        "{",
        '{"iteration": 1, "note": "a\u2028b"}',
        '{"note": "of another program"}',
        '{"iteration": 1, "reward": {}}',
        '{"iteration": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    log = MetricsLog(tmp_path, 2)
    log.write({"iteration": 2, "reward": {}})
    assert log.lines == 3
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"iteration": 0}\n{"iteration": 1, "reward": {}}\n{"iteration": 2, "reward": {}}\n'


def test_a_metrics_line_that_does_not_fit_is_cut_off_again(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, 0)
    log.write({"iteration": 0})
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        log.write({"iteration": 1})
    monkeypatch.undo()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 0}\n'
    log.write({"iteration": 1})
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.long
def test_interrupting_a_run_exits_with_130_and_keeps_the_last_checkpoint(tmp_path):
    recipe = tiny_recipe(
        tmp_path, run={"iterations": 10_000, "checkpoint_every": 1, "eval_every": 0, "keep_last": 2, "log": ["jsonl"]}
    )
    # a shell's background jobs start with SIGINT ignored
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [
        PYTHON,
        "-c",
        f"{heard}; from flowgrove.cli import app; app()",
        "train",
        str(recipe),
        "--out",
        str(tmp_path / "run"),
    ]
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
