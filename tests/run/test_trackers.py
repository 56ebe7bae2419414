"""One tracker: its queue and thread, TensorBoard's files, the process of the others and what it spares them."""

import io
import json
import os
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from engine_cases import strict_json
from flowgrove.errors import UserError
from flowgrove.run.trackers import child, feed, registry
from flowgrove.run.trackers.child import Sparing, calls, serve
from flowgrove.run.trackers.feed import Feed
from flowgrove.run.trackers.interface import Opened, flat, rows, tiles
from flowgrove.run.trackers.mlflow import MLflow
from flowgrove.run.trackers.remote import Remote
from flowgrove.run.trackers.tensorboard import TensorBoard
from flowgrove.run.trackers.wandb import WeightsAndBiases
from tracker_cases import PROMPTS, RECIPE, grid, opening, pixels, stand_in


class Recorder:
    """A tracker that notes what it is told; `does` is called first, with the name of the method."""

    def __init__(self, does=lambda call: None):
        self.calls, self.does = [], does

    def open(self, opening):
        self._note("open", opening)
        return Opened(opening.id or "new", "address")

    def numbers(self, iteration, values):
        self._note("numbers", iteration, values)

    def pictures(self, completed, pictures):
        self._note("pictures", completed, pictures)

    def close(self, status):
        self._note("close", status)

    def _note(self, call, *content):
        self.does(call)
        self.calls.append((call, *content))

    def numbers_of(self, call):
        return [content[1] for content in self.calls if content[0] == call]


def soon(seconds=20):
    return time.monotonic() + seconds


# What pictures are called


def test_every_picture_has_its_prompt_and_score():
    shown = grid()
    told = list(tiles(shown))
    assert [caption for _, caption in told] == [
        f"{PROMPTS[0]} ({shown.scores[0, 0]:.3f})",
        f"{PROMPTS[0]} ({shown.scores[0, 1]:.3f})",
        f"{PROMPTS[0]} (no score)",
        *(f"{PROMPTS[1]} ({score:.3f})" for score in shown.scores[1]),
    ]
    assert all(np.array_equal(tile, shown.tiles[n // 3, n % 3]) for n, (tile, _) in enumerate(told))
    (first, caption), _ = rows(shown)
    assert first.shape == (5, 21, 3)
    assert np.array_equal(first[:, 7:14], shown.tiles[0, 1])
    assert caption.startswith(PROMPTS[0])
    assert caption.endswith(", no score)")


def test_sources_stand_before_the_samples_of_their_prompt():
    shown = grid(sources=2)
    told = list(tiles(shown))
    assert [caption.endswith(" (source)") for _, caption in told] == 2 * [True, True, False, False, False]
    assert told[5][1] == f"{PROMPTS[1]} (source)"
    assert np.array_equal(told[6][0], shown.sources[1, 1])
    assert np.array_equal(told[7][0], shown.tiles[1, 0])
    (first, caption), _ = rows(shown)
    assert first.shape == (5, 5 * 7, 3)
    assert np.array_equal(first[:, 7:14], shown.sources[0, 1])
    assert np.array_equal(first[:, 14:21], shown.tiles[0, 0])
    assert caption == next(told for _, told in rows(grid()))


def test_sections_are_parts_of_names():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": [3]}}}) == {"a": 1, "b/c": 2, "b/d/e": [3]}


# The queue


def test_a_tracker_is_told_all_in_order():
    tracker, shown, given = Recorder(), grid(), opening("run")
    fed = Feed("Tracker", tracker, given)
    for iteration in range(5):
        fed.numbers(iteration, {"loss": iteration / 2})
    fed.pictures(5, shown)
    fed.end("finished")
    fed.wait(soon())
    numbers = [("numbers", iteration, {"loss": iteration / 2}) for iteration in range(5)]
    assert tracker.calls == [("open", given), *numbers, ("pictures", 5, shown), ("close", "finished")]


class TextlessError(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize("where", ["open", "numbers", "pictures", "close"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SystemExit(3), KeyboardInterrupt(), TextlessError()]
)
def test_the_first_error_of_a_tracker_is_one_warning_and_its_last_word(where, error, caplog):
    def fails(call):
        if call == where:
            raise error

    tracker = Recorder(fails)
    fed = Feed("Tracker", tracker, opening("run"))
    for iteration in range(3):
        fed.numbers(iteration, {})
        fed.pictures(iteration, grid())
    fed.end("finished")
    fed.wait(soon())
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    (message,) = caplog.messages
    assert message.startswith(f"Tracker gets no more metrics: {reason}")
    assert message.endswith("; metrics.jsonl does")
    assert "close" not in [call for call, *_ in tracker.calls]
    assert not fed._thread.is_alive()


def test_a_tracker_that_hangs_is_not_waited_for_and_holds_little(monkeypatch, caplog):
    monkeypatch.setattr(feed, "_PATIENCE", 0.05)
    go_on, abandoned = threading.Event(), threading.Event()
    tracker = Recorder(lambda call: go_on.wait(30))

    def abandon():
        abandoned.set()
        go_on.set()

    fed = Feed("Tracker", tracker, opening("run"), abandon)
    shown, started = grid(), time.monotonic()
    for iteration in range(3000):
        fed.numbers(iteration, {"loss": 1.0})
        fed.pictures(iteration, shown)
    assert len(fed._queue) <= feed._MOST_NUMBERS + feed._MOST_PICTURES + 1
    fed.end("stopped")
    fed.wait(time.monotonic() + 0.2)
    assert abandoned.is_set()
    assert time.monotonic() - started < 10
    full, waits, left, missed = caplog.messages
    assert full.startswith("Tracker does not keep up")
    assert waits.startswith("waiting for Tracker")
    assert left.startswith("Tracker gets no more metrics: it has not come to an end")
    assert "2000 iterations" in missed
    assert "grids" in missed


def test_a_tracker_that_is_slow_misses_only_what_it_has_no_time_for(monkeypatch, caplog):
    monkeypatch.setattr(feed, "_MOST_NUMBERS", 4)
    go_on = threading.Event()
    tracker = Recorder(lambda call: go_on.wait(30))
    fed = Feed("Tracker", tracker, opening("run"))
    for iteration in range(10):
        fed.numbers(iteration, {})
    go_on.set()
    fed.end("finished")
    fed.wait(soon())
    assert tracker.numbers_of("numbers") == [0, 1, 2, 3]
    assert tracker.calls[-1] == ("close", "finished")
    assert caplog.messages[-1] == "Tracker has missed 6 iterations; metrics.jsonl has all metrics"


def test_a_process_that_has_no_more_threads_has_no_tracker(monkeypatch, caplog):
    def none_left(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    fed = Feed("Tracker", Recorder(), opening("run"))
    fed.numbers(0, {})
    fed.end("finished")
    fed.wait(soon())
    assert len(caplog.messages) == 1


# TensorBoard


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


def board(folder, first, iterations, pictures=()):
    tracker = TensorBoard()
    tracker.open(opening(folder, first_iteration=first))
    for iteration in iterations:
        tracker.numbers(iteration, {"loss": iteration / 4, "seconds/update": 0.5})
    for completed, shown in pictures:
        tracker.pictures(completed, shown)
    tracker.close("finished")


def test_tensorboard_holds_the_numbers_pictures_and_recipe(tmp_path):
    before, after = grid(1), grid(2)
    board(tmp_path, 0, range(3), [(0, before), (3, after)])
    events = events_of(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert [event.value for event in events.Scalars("seconds/update")] == [0.5] * 3
    for row in range(2):
        found = events.Images(f"samples/{row}")
        assert [event.step for event in found] == [0, 3]
        for event, shown in zip(found, (before, after), strict=True):
            picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            assert (event.height, event.width) == picture.shape[:2]
            for column in range(3):
                assert np.array_equal(picture[:, 7 * column : 7 * column + 7], shown.tiles[row, column])
        assert events.SummaryMetadata(f"samples/{row}").summary_description.startswith(PROMPTS[row])
    (told,) = events.Tensors("recipe/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    assert yaml.safe_load("".join(line[4:] + "\n" for line in text.splitlines())) == RECIPE


def test_tensorboard_compares_runs_by_their_recipes(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    board(tmp_path, 0, range(1))
    content = events_of(tmp_path).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["update/lr"].number_value == 1e-4
    assert values["model/path"].string_value == "tiny"
    assert json.loads(values["update/clip_range"].string_value) == [0.1, 0.2]
    assert set(values) == set(flat(RECIPE))


def test_tensorboard_takes_back_what_is_run_again(tmp_path):
    board(tmp_path, 0, range(5), [(0, grid(1)), (4, grid(2))])
    again = grid(3)
    board(tmp_path, 2, range(2, 4), [(4, again)])
    events = events_of(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    found = events.Images("samples/0")
    assert [event.step for event in found] == [0, 4]
    picture = np.asarray(Image.open(io.BytesIO(found[1].encoded_image_string)))
    assert np.array_equal(picture[:, :7], again.tiles[0, 0])


def test_tensorboard_leaves_no_thread(tmp_path):
    before = threading.active_count()
    board(tmp_path, 0, range(2))
    assert threading.active_count() == before


# What is spared a tracker that fails


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def sparing(tracker, folder, **changes):
    """(Sparing, what it tells, its clock), opened."""
    told, clock = [], Clock()
    spared = Sparing("wandb", tracker, lambda teller, text: told.append((teller, text)), clock)
    spared.open(opening(folder, **changes))
    return spared, told, clock


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trackers").mkdir()
    return tmp_path


def state(folder):
    return strict_json((folder / "trackers" / "wandb.json").read_text())


def test_a_tracker_that_fails_is_tried_again_ever_more_rarely(folder):
    down = True

    def fails(call):
        tried.append(clock.now)
        if down:
            raise ConnectionError("no route to host")

    tried = []
    told, clock = [], Clock()
    tracker = Recorder(fails)
    spared = Sparing("wandb", tracker, lambda *said: told.append(said), clock)
    spared.open(opening(folder))
    for second in range(1, 20_000):
        clock.now = float(second)
        spared.numbers(second, {})
    assert tried == [0, 60, 180, 420, 900, 1860, 3780, 7380, 10980, 14580, 18180]
    assert told == [("warn", "misses metrics for now: ConnectionError: no route to host; metrics.jsonl has them all")]
    down, clock.now = False, 30_000.0
    spared.numbers(30_000, {})
    spared.numbers(30_001, {})
    spared.close("finished")
    assert [call for call, *_ in tracker.calls] == ["open", "numbers", "numbers", "close"]
    assert told[1] == ("say", "address")
    assert told[2] == ("warn", "has missed 19999 iterations and grids; metrics.jsonl has all metrics")
    assert len(told) == 3


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), TextlessError()])
def test_what_ends_a_process_ends_no_tracker(folder, error):
    failing = {"open"}

    def fails(call):
        if call in failing:
            raise error

    tracker = Recorder(fails)
    spared, told, clock = sparing(tracker, folder)
    failing.clear()
    clock.now = 61.0
    spared.numbers(0, {})
    spared.close("finished")
    assert [call for call, *_ in tracker.calls] == ["open", "numbers", "close"]
    assert [teller for teller, _ in told] == ["warn", "say"]


def test_a_run_that_goes_on_is_the_same_one_and_nothing_is_told_twice(folder):
    first = Recorder()
    spared, _, _ = sparing(first, folder)
    spared.pictures(0, grid())
    for iteration in range(4):
        spared.numbers(iteration, {})
    spared.close("stopped")
    assert state(folder) == {"id": "new", "grids": 1, "iterations": 4}
    second = Recorder()
    spared, _, _ = sparing(second, folder, first_iteration=2)
    spared.pictures(0, grid())
    spared.pictures(4, grid())
    for iteration in range(2, 6):
        spared.numbers(iteration, {})
    spared.close("finished")
    assert second.calls[0][1].id == "new"
    assert second.numbers_of("numbers") == [4, 5]
    assert second.numbers_of("pictures") == [4]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', '{"id": 3, "iterations": "many", "grids": null}'])
def test_what_is_known_of_a_tracker_may_be_damaged(folder, content):
    (folder / "trackers" / "wandb.json").write_text(content)
    tracker = Recorder()
    spared, _, _ = sparing(tracker, folder)
    spared.numbers(0, {})
    assert tracker.numbers_of("numbers") == [0]
    assert state(folder) == {"id": "new", "iterations": 1}


def test_a_full_disk_costs_only_what_is_known_of_a_tracker(folder, monkeypatch):
    def full(path, text, encoding):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    tracker = Recorder()
    spared, told, _ = sparing(tracker, folder)
    spared.numbers(0, {})
    assert tracker.numbers_of("numbers") == [0]
    assert told == [("say", "address")]


def test_nothing_that_weights_and_biases_is_told_comes_too_late_for_its_steps(folder, monkeypatch):
    rows = {}  # of the run on the server, by step

    class Run:
        url = None

        def __init__(self):
            self.step, self.row = max(rows, default=-1) + 1, {}

        def log(self, values, step):
            if step < self.step:
                return  # what it does too, with a line in its log
            if step > self.step:
                self.finish()
            self.step = step
            self.row |= values

        def finish(self, exit_code=0):
            if self.row:
                rows[self.step] = self.row
            self.row = {}

    package = SimpleNamespace(
        init=lambda **_: Run(), Settings=lambda **_: None, Image=lambda tile, caption: (tile.tobytes(), caption)
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    # parts of a run of 4 iterations, then 5, evaluated before each: stopped in iterations 0 and 2, twice at the end
    parts = [
        (0, [0], "stopped"),
        (0, [0, "0", 1, "1", 2], "stopped"),
        (1, ["1", 2, "2", 3, 4, "3"], "finished"),
        (3, [3, "3", 4, 5, "4"], "finished"),
    ]
    for first, told, status in parts:
        spared, _, _ = sparing(WeightsAndBiases(), folder, first_iteration=first)
        for one in told:
            if isinstance(one, str):
                spared.numbers(int(one), {"loss": float(one)})
            else:
                spared.pictures(one, grid(one))
        spared.close(status)
    assert {step: row["loss"] for step, row in rows.items() if "loss" in row} == {n + 1: float(n) for n in range(5)}
    shown = {step: [picture for picture, _ in row["samples"]] for step, row in rows.items()}
    assert shown == {n: [tile.tobytes() for tile, _ in tiles(grid(n))] for n in range(6)}
    assert state(folder) == {"id": state(folder)["id"], "grids": 6, "iterations": 5}


@pytest.mark.parametrize("failing", ["log_batch", "log_dict"])
def test_mlflow_begins_one_run_whatever_fails_afterwards(folder, monkeypatch, failing):
    failures = {failing}
    created, batches, kept = [], [], []

    class MlflowClient:
        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id="1")

        def create_run(self, experiment, tags):
            created.append(experiment)
            return SimpleNamespace(info=SimpleNamespace(run_id=f"run {len(created)}"))

        def log_batch(self, run, metrics=(), params=()):
            kept.append(state(folder)["id"])
            if "log_batch" in failures:
                raise ConnectionError("no route to host")
            batches.append((run, [metric.step for metric in metrics]))

        def log_dict(self, run, content, file):
            if "log_dict" in failures:
                raise PermissionError("no artifacts here")

        def set_terminated(self, run, status):
            batches.append((run, status))

    metric = namedtuple("Metric", "key value timestamp step")
    package = SimpleNamespace(MlflowClient=MlflowClient)
    monkeypatch.setitem(sys.modules, "mlflow", package)
    entities = SimpleNamespace(Param=namedtuple("Param", "key value"), Metric=metric)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    spared, told, clock = sparing(MLflow(), folder)
    spared.numbers(0, {"loss": 1.0})
    failures.clear()
    for iteration in (1, 2):
        clock.now += 100.0
        spared.numbers(iteration, {"loss": 1.0})
    spared.close("finished")
    assert created == ["1"]
    assert set(kept) == {"run 1"}
    assert batches[-3:] == [("run 1", [1]), ("run 1", [2]), ("run 1", "FINISHED")]
    assert told[0][0] == "warn"
    assert told[0][1].startswith("does not have the recipe: ")


# Between the processes


class Lines:
    """Takes what a Remote sends."""

    def __init__(self):
        self.content = b""

    def write(self, content):
        self.content += content

    def flush(self):
        pass


def sent(shown):
    """What a run sends, as bytes."""
    remote = Remote("wandb", print, print)
    remote._process, remote._pipe = object(), Lines()
    remote.numbers(3, {"loss": 1e-300, "odd": float("nan")})
    remote.pictures(4, shown)
    remote._send("close", {"status": "finished"})
    return remote._pipe.content


@pytest.mark.parametrize("sources", [0, 2])
def test_numbers_and_pictures_arrive_as_they_were(folder, sources):
    tracker, shown = Recorder(), grid(sources=sources)
    spared, _, _ = sparing(tracker, folder)
    serve(spared, io.BytesIO(sent(shown)))
    _, (_, iteration, values), (_, completed, pictures), (_, status) = tracker.calls
    assert (iteration, values["loss"], completed, status) == (3, 1e-300, 4, "finished")
    assert np.isnan(values["odd"])
    assert pictures.prompts == shown.prompts
    assert np.array_equal(pictures.scores, shown.scores, equal_nan=True)
    assert np.array_equal(pictures.tiles, shown.tiles)
    assert (pictures.sources is None) == (sources == 0)
    assert not sources or np.array_equal(pictures.sources, shown.sources)


def test_a_run_may_be_killed_anywhere(folder, monkeypatch):
    content = sent(grid(rows=1, columns=1))
    whole = [len(list(calls(io.BytesIO(content[:length])))) for length in range(len(content) + 1)]
    assert whole == sorted(whole)
    assert whole[-1] == 3
    tracker, timers = Recorder(), []
    monkeypatch.setattr(child.threading, "Timer", lambda *arguments: timers.append(arguments) or threading.Thread())
    spared, _, _ = sparing(tracker, folder)
    serve(spared, io.BytesIO(content[: len(content) // 2]))
    assert tracker.calls[-1] == ("close", "failed")
    assert timers == [(child._AFTER_THE_RUN, os._exit, (1,))]


# In a process of its own


def fed_to_stand_in(run, iterations, status="finished", seconds=30):
    """(what the user is told, seconds that the run was held up) of a run that is fed to the stand-in for W&B."""
    run.mkdir(exist_ok=True)
    said = []
    remote = Remote("wandb", said.append, said.append)
    started = time.monotonic()
    fed = Feed("W&B", remote, opening(run, process=os.getpid(), project="p", group="g", tags=["t"]), remote.abandon)
    for iteration in iterations:
        fed.numbers(iteration, {"loss": float(iteration)})
    held = time.monotonic() - started
    fed.pictures(iterations[-1] + 1, grid())
    fed.end(status)
    fed.wait(soon(seconds))
    assert not fed._thread.is_alive()
    return said, held


def test_a_tracker_has_a_process_of_its_own(tmp_path, monkeypatch, caplog):
    recorded, run = stand_in(tmp_path, monkeypatch), tmp_path / "run"
    monkeypatch.setenv("TRACKER_ON_LOG", "print('talk'); sys.stdout.flush(); os.write(1, b'more talk\\n')")
    said, _ = fed_to_stand_in(run, range(3), "stopped")
    first, *logs, last = recorded()
    shown = grid()
    assert said == ["https://tracker.example/run"]
    assert caplog.messages == []
    assert first["process"] != os.getpid()
    assert (first["project"], first["name"], first["group"], first["tags"]) == ("p", "mine", "g", ["t"])
    assert (first["config"], first["dir"], first["resume"], first["mode"]) == (RECIPE, str(run), "allow", None)
    assert first["settings"] == {"console": "off", "x_stats_pid": os.getpid()}
    assert [(one["step"], one["values"]) for one in logs] == [(n + 1, {"loss": float(n)}) for n in range(3)] + [(3, {})]
    assert [image["caption"] for image in logs[-1]["images"]] == [caption for _, caption in tiles(shown)]
    for image, (tile, _) in zip(logs[-1]["images"], tiles(shown), strict=True):
        assert np.array_equal(pixels(image), tile)
    assert last["exit_code"] == 255
    assert (run / "trackers" / "wandb.log").read_text().splitlines().count("more talk") == 4
    fed_to_stand_in(run, range(1, 5))
    again = recorded()[len(logs) + 2 :]
    assert again[0]["id"] == first["id"]
    assert [one["step"] for one in again if one["call"] == "log"] == [4, 5, 5]
    assert again[-1]["exit_code"] == 0


@pytest.mark.parametrize(
    ("where", "does", "word"),
    [
        ("INIT", "raise SystemExit(1)", "SystemExit"),
        ("INIT", "raise ConnectionError('offline')", "offline"),
        ("LOG", "os._exit(3)", "exit code 3"),
        ("LOG", "os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("FINISH", "raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_a_tracker_that_fails_is_one_warning(tmp_path, monkeypatch, caplog, where, does, word):
    stand_in(tmp_path, monkeypatch)
    monkeypatch.setenv(f"TRACKER_ON_{where}", does)
    said, _ = fed_to_stand_in(tmp_path / "run", range(200))
    warnings = [text for text in [*said, *caplog.messages] if word in text]
    assert len(warnings) == 1
    assert "metrics.jsonl" in warnings[0]


def test_a_tracker_that_hangs_is_ended_with_what_it_has_started(tmp_path, monkeypatch, caplog):
    stand_in(tmp_path, monkeypatch)
    monkeypatch.setattr(feed, "_PATIENCE", 0.1)
    started = tmp_path / "started"
    hang = f"import subprocess; Path({str(started)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
    monkeypatch.setenv(
        "TRACKER_ON_INIT", hang + "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); time.sleep(600)"
    )
    _, held = fed_to_stand_in(tmp_path / "run", range(3000), seconds=6)
    assert held < 3
    assert any("does not keep up" in text for text in caplog.messages)
    assert any("has not come to an end" in text for text in caplog.messages)
    place = Path("/proc") / started.read_text()
    while place.exists() and "State:\tZ" not in (place / "status").read_text():
        time.sleep(0.05)


def test_what_a_package_leaves_for_the_end_of_the_process_is_not_waited_for(tmp_path, monkeypatch, caplog):
    recorded = stand_in(tmp_path, monkeypatch)
    leave = "atexit.register(time.sleep, 600); threading.Thread(target=time.sleep, args=(600,)).start()"
    monkeypatch.setenv("TRACKER_ON_INIT", f"{leave}; signal.raise_signal(signal.SIGINT)")
    fed_to_stand_in(tmp_path / "run", range(2), seconds=20)
    assert recorded()[-1]["exit_code"] == 0
    assert caplog.messages == []


def test_signals_to_all_processes_of_a_job_do_not_end_a_tracker(tmp_path, monkeypatch, caplog):
    recorded = stand_in(tmp_path, monkeypatch)
    monkeypatch.setenv(
        "TRACKER_ON_LOG", "[signal.raise_signal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]"
    )
    fed_to_stand_in(tmp_path / "run", range(2), "stopped")
    assert [one["step"] for one in recorded() if one["call"] == "log"][:2] == [1, 2]
    assert recorded()[-1]["exit_code"] == 255
    assert caplog.messages == []


# Which are there


def test_what_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "TRACKERS", dict.fromkeys(("tensorboard", "no_such_tracker")))
    (tmp_path / "no_such_tracker").mkdir()  # what a tracker leaves in the working folder
    registry.check_installed(["jsonl", "tensorboard"])
    with pytest.raises(UserError, match=r"pip install no_such_tracker, or take no_such_tracker out of run\.log"):
        registry.check_installed(["jsonl", "no_such_tracker"])
    assert registry.installed_line() == "usable in run.log: tensorboard; pip install for: no_such_tracker"
