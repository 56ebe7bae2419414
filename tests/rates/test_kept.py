"""What measurements are kept for later commands: round trips, and files that are damaged."""

import json

import pytest
import torch

from flowgrove.rates import kept
from flowgrove.rates.kept import ModelTimes, Passes, Rate, keep_rates, place_of, rates_of
from flowgrove.rates.measuring import copy_rate, matrix_rate
from policy_cases import CPU


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The cache file of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flowgrove" / "rates.json"


def times(name="flux", date="2026-01-01", **passes):
    found = passes or {"forward": Passes(flops=10.0, seconds={1: 0.5, 2: 0.75})}
    settings = {"attention": "sdpa"}
    return ModelTimes(
        name=name, architecture="a", size="s", dtype="fp32", settings=settings, source="tune", date=date, passes=found
    )


def test_what_is_kept_comes_back_and_is_added_to():
    assert not rates_of(CPU)
    keep_rates(CPU, {"fp32": 1e9}, 2e9, {"one": times()})
    keep_rates(CPU, {"bf16": 3e9}, None, {"two": times("wan")})
    found = rates_of(CPU)
    assert found.matrix == {name: Rate(rate=rate, date=kept.today()) for name, rate in (("fp32", 1e9), ("bf16", 3e9))}
    assert found.copied.rate == 2e9
    assert found.models == {"one": times(), "two": times("wan")}
    assert found.models["one"].passes["forward"].seconds == {1: 0.5, 2: 0.75}
    assert found.device == place_of(CPU)
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in found.device


def test_two_devices_share_the_file(file, monkeypatch):
    keep_rates(CPU, {"fp32": 1e9})
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 77)
        keep_rates(CPU, {"fp32": 5e9})
        assert rates_of(CPU).matrix["fp32"].rate == 5e9
    assert rates_of(CPU).matrix["fp32"].rate == 1e9
    assert len(json.loads(file.read_text())) == 2


def test_what_was_measured_longest_ago_goes_first(monkeypatch):
    monkeypatch.setattr(kept, "_MOST_MODELS", 2)
    for day in (3, 1, 2):
        keep_rates(CPU, models={str(day): times(date=f"2026-01-0{day}")})
    assert set(rates_of(CPU).models) == {"2", "3"}


def damage(content, place):
    one = content[place]["models"]["one"]
    return {
        "rates that are no numbers": lambda: content[place].update(matrix={"fp32": {"rate": "fast", "date": ""}}),
        "a negative rate": lambda: content[place].update(copied={"rate": -1.0, "date": ""}),
        "a model without passes": lambda: one.pop("passes"),
        "a pass without times": lambda: one["passes"]["forward"].update(seconds={}),
        "a pass of no rows": lambda: one["passes"]["forward"].update(seconds={"0": 1.0}),
        "a time that is infinite": lambda: one["passes"]["forward"].update(seconds={"1": float("inf")}),
        "a list for a device": lambda: content.update({place: []}),
    }


@pytest.mark.parametrize("name", damage({"p": {"models": {"one": {}}}}, "p"))
def test_a_damaged_device_is_as_if_never_measured_and_others_stay(name, file):
    keep_rates(CPU, {"fp32": 1e9}, 1e9, {"one": times()})
    content = json.loads(file.read_text())
    damage(content, place_of(CPU))[name]()
    content["another"] = {"device": "another"}
    file.write_text(json.dumps(content))
    assert not rates_of(CPU)
    keep_rates(CPU, {"fp32": 4e9})
    assert rates_of(CPU).matrix["fp32"].rate == 4e9
    assert "another" in json.loads(file.read_text())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff"])
def test_a_damaged_file_is_as_if_it_were_not_there(text, file):
    file.parent.mkdir(parents=True)
    file.write_bytes(text.encode("latin-1"))
    assert not rates_of(CPU)
    keep_rates(CPU, {"fp32": 4e9})
    assert rates_of(CPU).matrix["fp32"].rate == 4e9


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    keep_rates(CPU, {"fp32": 4e9})
    assert "what was measured is not kept" in caplog.text


def test_rates_are_flops_and_bytes_by_the_seconds_that_they_take(monkeypatch):
    monkeypatch.setattr("flowgrove.rates.measuring._seconds", lambda device, work: 0.5)
    assert matrix_rate(CPU, torch.float32, 16) == 2 * 16**3 / 0.5
    assert copy_rate(CPU, 1000) == 2 * 4 * 1000 / 0.5


def test_rates_of_this_machine_are_positive():
    assert matrix_rate(CPU, torch.float32, 32) > 0
    assert copy_rate(CPU, 1024) > 0
