"""A run as trackers see it, and packages that stand in for theirs: in files, as trackers run in other processes."""

import json
import struct
import sys
from textwrap import dedent

import numpy as np

from flowgrove.report.grids import Grid
from flowgrove.run.trackers.interface import Opening

PROMPTS = ["a red circle <b>", "zwei Sterne ☆"]
RECIPE = {"model": {"path": "tiny", "lora": None}, "update": {"lr": 1e-4, "clip_range": [0.1, 0.2]}, "run": {"seed": 3}}
STAND_IN = """
    import atexit, json, os, random, signal, sys, threading, time
    from pathlib import Path

    def note(call, **content):
        with open(os.environ["TRACKER_CALLS"], "a") as file:
            file.write(json.dumps({"call": call, "process": os.getpid(), **content}) + "\\n")

    def misbehave(where):
        exec(os.environ.get("TRACKER_ON_" + where, ""), globals())

    class Settings:
        model_fields = ("console", "x_stats_pid")
        def __init__(self, **content):
            self.content = content

    class Image:
        def __init__(self, data, caption=None):
            self.content = {"shape": list(data.shape), "bytes": data.tobytes().hex(), "caption": caption}

    class Run:
        url = "https://tracker.example/run"
        def log(self, values, step):
            misbehave("LOG")
            images = [image.content for image in values.pop("samples", [])]
            note("log", step=step, values=values, images=images)
        def finish(self, exit_code):
            misbehave("FINISH")
            note("finish", exit_code=exit_code)

    def init(**content):
        misbehave("INIT")
        settings = content.pop("settings").content
        note("init", **content, settings=settings)
        return Run()
"""


def grid(seed=0, rows=2, columns=3, height=5, width=7, sources=0):
    """Tiles of noise, and of so many sources; the last sample of the first prompt has no score."""
    random = np.random.default_rng(seed)
    scores = random.random((rows, columns))
    scores[0, -1] = np.nan
    samples = random.integers(0, 256, (rows, columns, height, width, 3), np.uint8)
    own = random.integers(0, 256, (rows, sources, height, width, 3), np.uint8) if sources else None
    return Grid(samples, PROMPTS[:rows], scores, (), own)


def opening(folder, **changes):
    return Opening(**{"folder": str(folder), "name": "mine", "recipe": RECIPE, **changes})


def stand_in(folder, monkeypatch, name="wandb"):
    """Installs a package for this process and those that it starts. Returns what gives the calls that it has had."""
    place = folder / "packages"
    place.mkdir(exist_ok=True)
    (place / f"{name}.py").write_text(dedent(STAND_IN))
    calls = folder / "calls.jsonl"
    monkeypatch.setenv("TRACKER_CALLS", str(calls))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(place)
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def pixels(image):
    """What a stand-in was given as a picture."""
    return np.frombuffer(bytes.fromhex(image["bytes"]), np.uint8).reshape(image["shape"])


def log_records(path):
    """The records of a file in LevelDB's log format (its doc/log_format.md) after 7 bytes of another kind, which are
    those of W&B and SwanLab."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the end of a block that has no room for a header is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
