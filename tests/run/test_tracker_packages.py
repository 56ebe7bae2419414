"""The trackers' own packages, where they are installed: what they have written without a network is read back."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flowgrove.recipe.loading import parse_recipe
from flowgrove.run import tracking
from flowgrove.run.trackers import feed
from flowgrove.run.trackers.interface import flat, rows, tiles
from flowgrove.run.trackers.registry import is_installed
from flowgrove.run.tracking import Trackers
from planner_cases import recipe_content
from tracker_cases import grid, log_records

BEFORE, AFTER = grid(1), grid(2)
LINES = [{"iteration": n, "loss": n / 4, "grad_norm": None, "reward": {"shapes": {"mean": 0.1 * n}}} for n in range(4)]
EXPECTED = {"loss": [0.0, 0.25, 0.5, 0.75], "reward/shapes/mean": [0.0, 0.1, 0.2, 0.1 * 3]}


def needs(name):
    return pytest.mark.skipif(not is_installed(name), reason=f"needs {name}")


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """What trains and tracks a run in two parts, as its recipe says for one tracker; returns its folder and recipe."""
    monkeypatch.setattr(feed, "_PATIENCE", 120.0)
    monkeypatch.setitem(tracking._LONGEST, "finished", 120.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_MODE", "TRACKIO_SPACE_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))

    def train(name):
        folder = tmp_path / "run"
        folder.mkdir()
        told = {"project": "shapes", "group": "seeds", "tags": ["a", "b"], "mode": "offline"}
        recipe = parse_recipe(recipe_content(run={"log": [name], "tracking": told}))
        first = Trackers(recipe, folder, 0, print)
        first.pictures(0, BEFORE)
        for line in LINES[:2]:
            first.numbers(line)
        first.close("finished")
        second = Trackers(recipe, folder, 1, print)
        for line in LINES[1:]:
            second.numbers(line)
        second.pictures(4, AFTER)
        second.close("finished")
        log = (folder / "trackers" / f"{name}.log").read_text()
        assert caplog.messages == [], log
        known = json.loads((folder / "trackers" / f"{name}.json").read_text())
        assert (known["iterations"], known["grids"]) == (4, 5)
        return folder, recipe.model_dump(mode="json"), known["id"]

    return train


@needs("wandb")
def test_weights_and_biases(run):
    from wandb.proto import wandb_internal_pb2

    folder, recipe, name = run("wandb")
    found, shown, codes = {}, {}, []
    parts = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    for part in parts:
        for content in log_records(part):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.HasField("run"):
                told = record.run
                assert (told.run_id, told.project, told.display_name, told.run_group) == (
                    name,
                    "shapes",
                    "run",
                    "seeds",
                )
                assert list(told.tags) == ["a", "b"]
                config = {item.key: json.loads(item.value_json) for item in told.config.update}
                assert {key: config.get(key) for key in recipe} == recipe
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for key in EXPECTED:
                    if key in items:
                        found.setdefault(key, {})[items["_step"]] = items[key]
                if "samples/captions" in items:
                    shown[items["_step"]] = items, part.parent / "files"
            if record.HasField("exit"):
                codes.append(record.exit.exit_code)
    assert len(parts) == 2
    assert codes == [0, 0]
    assert found == {key: dict(enumerate(values, 1)) for key, values in EXPECTED.items()}
    assert sorted(shown) == [0, 4]
    for (images, place), expected in ((shown[0], BEFORE), (shown[4], AFTER)):
        assert images["samples/captions"] == [caption for _, caption in tiles(expected)]
        for file, (tile, _) in zip(images["samples/filenames"], tiles(expected), strict=True):
            assert np.array_equal(np.asarray(Image.open(place / file).convert("RGB")), tile)


@needs("swanlab")
def test_swanlab(run):
    from swanlab.proto.swanlab.record.v1 import record_pb2

    folder, recipe, name = run("swanlab")
    parts = sorted((folder / "swanlab").glob("run-*/run-*.swanlab"))
    assert [part.stem for part in parts] == [f"run-{name}"] * 2
    found, shown = {key: [] for key in EXPECTED}, {}
    for part in parts:
        records = [record_pb2.Record.FromString(content) for content in log_records(part)]
        (start,) = [record.start for record in records if record.HasField("start")]
        assert (start.id, start.project, start.name, start.group) == (name, "shapes", "run", "seeds")
        assert list(start.tags) == ["a", "b"]
        for record in records:
            if record.HasField("scalar") and record.scalar.key in found:
                found[record.scalar.key].append((record.scalar.step, record.scalar.value.number))
            if record.HasField("media"):
                shown[record.media.step] = record.media.value.items, part.parent / "media" / "image"
        assert sum(record.HasField("finish") for record in records) == 1
        config = yaml.safe_load((part.parent / "files" / "config.yaml").read_text())
        assert {key: config[key]["value"] for key in recipe} == recipe
    for key, values in EXPECTED.items():
        assert found[key] == [(step, pytest.approx(value)) for step, value in enumerate(values)]
    for (images, place), expected in ((shown[0], BEFORE), (shown[4], AFTER)):
        for image, (tile, caption) in zip(images, tiles(expected), strict=True):
            assert image.caption == caption
            assert np.array_equal(np.asarray(Image.open(place / image.filename).convert("RGB")), tile)


@needs("trackio")
def test_trackio(run):
    folder, recipe, name = run("trackio")
    with sqlite3.connect(folder.parent / "trackio" / "shapes.db") as store:
        logs = [
            (step, json.loads(told)) for step, told in store.execute("select step, metrics from metrics order by id")
        ]
        names = {row for (row,) in store.execute("select distinct run_name from metrics")}
        (config,) = [json.loads(told) for (told,) in store.execute("select config from configs")]
    assert names == {name}
    assert name.startswith("run-")
    assert {key: config[key] for key in recipe} == recipe
    for key, values in EXPECTED.items():
        assert [(step, told[key]) for step, told in logs if key in told] == list(enumerate(values))
    for completed, expected in ((0, BEFORE), (4, AFTER)):
        for row, (picture, caption) in enumerate(rows(expected)):
            (image,) = [told[f"samples/{row}"] for step, told in logs if step == completed and f"samples/{row}" in told]
            assert image["caption"] == caption
            place = folder.parent / "trackio" / "media" / image["file_path"]
            assert np.array_equal(np.asarray(Image.open(place).convert("RGB")), picture)


@needs("mlflow")
@pytest.mark.skipif(not is_installed("sqlalchemy"), reason="mlflow-skinny keeps nothing on this machine")
def test_mlflow(run):
    from mlflow import MlflowClient

    _, recipe, name = run("mlflow")
    client = MlflowClient()
    found = client.get_run(name)
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert client.get_experiment(found.info.experiment_id).name == "shapes"
    assert {key: found.data.tags[key] for key in ("group", "a", "b")} == {"group": "seeds", "a": "true", "b": "true"}
    assert set(found.data.params) == set(flat(recipe))
    assert found.data.params["run/tracking/tags"] == '["a", "b"]'
    for key, values in EXPECTED.items():
        assert [(one.step, one.value) for one in client.get_metric_history(name, key)] == list(enumerate(values))
    place = Path(client.download_artifacts(name, ""))
    assert yaml.safe_load((place / "recipe.yaml").read_text()) == recipe
    for completed, expected in ((0, BEFORE), (4, AFTER)):
        captions = json.loads((place / "samples" / f"after_{completed:06d}.json").read_text())
        for row, (picture, caption) in enumerate(rows(expected)):
            (file,) = (place / "images").glob(f"samples?{row}?step?{completed}?*.png")
            assert np.array_equal(np.asarray(Image.open(file).convert("RGB")), picture)
            assert captions[f"samples/{row}"] == caption
