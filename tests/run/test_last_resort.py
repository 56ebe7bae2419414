"""What nobody foresaw: one line, exit code 1, and the whole trace in a file (issue 13)."""

import re
import tempfile
from pathlib import Path

import pytest

from engine_cases import error_line, flowgrove, refuse, tiny_recipe
from flowgrove import setup as derived
from flowgrove.run import last_resort


class MuteError(Exception):
    def __str__(self):
        raise ValueError


@pytest.fixture
def breaking(monkeypatch, tmp_path):
    """A function that lets `flowgrove plan` raise, and returns its result."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(error):
        def raise_it(*arguments):
            raise error

        monkeypatch.setattr(derived, "make_plan", raise_it)
        return flowgrove("plan", tiny_recipe(tmp_path / "recipe"))

    return run


UNFORESEEN = [
    TypeError("two\nlines [/red]"),
    KeyError("x"),
    SystemExit(0),
    MuteError(),
    MemoryError(),
    RecursionError("deep"),
    AssertionError("\ud800"),
]


@pytest.mark.parametrize("error", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_the_unforeseen_is_one_line_exit_code_1_and_a_file_with_the_trace(breaking, error):
    result = breaking(error)
    assert result.exit_code == 1
    line = error_line(result.stdout, result.stderr)
    assert type(error).__name__ in line
    assert "report it" in line
    trace = Path(re.search(r"the file (\S+\.txt)", line)[1]).read_text()
    assert "Traceback" in trace
    assert "raise_it" in trace
    assert "torch" in trace


def test_without_a_place_for_the_file_the_trace_is_shown(breaking, monkeypatch):
    def no_room(*arguments, **options):
        raise OSError("no room")

    monkeypatch.setattr(last_resort.tempfile, "NamedTemporaryFile", no_room)
    result = breaking(TypeError("odd"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: TypeError: odd")


def test_paths_of_options_know_the_home_and_say_what_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tiny_recipe(tmp_path / "mine")
    assert str(tmp_path / "full") in refuse("export", "~/full", "--out", "~/out")
    assert "~nobody-here" in refuse("train", recipe, "--out", "~nobody-here/run")
    assert str(tmp_path / "gone") in refuse("train", recipe, "--out", tmp_path / "run", "--resume", "~/gone")
