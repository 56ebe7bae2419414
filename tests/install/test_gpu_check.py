"""The one command for a GPU machine: every row of its table runs on a CPU, none stops another,
and the kit holds what that machine lacks.
"""

import importlib
import io
import json
import re
import time
from pathlib import Path

import pytest

from subprocesses import ROOT, python

SCRIPT = ROOT / "profiling" / "gpu_check.py"


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    return importlib.import_module("gpu_check")


@pytest.fixture
def gpu_kit(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))
    return importlib.import_module("gpu_kit")


def dry_run(call, out, *options):
    done = python(SCRIPT, call, "--dry-run", "--out", out, *options, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    table = done.stdout.split("==== gpu_check\n")[1]
    assert len(table) < 12_000
    assert sum(1 for path in out.rglob("*") if path.is_file()) <= 8
    return table.splitlines()


def steps_of(lines):
    found = (re.match(r"(.{16}) (.{14}) +[\d.]+ s  ", line) for line in lines)
    return {match[1].strip(): match[2].strip() for match in found if match}


@pytest.mark.long
def test_every_row_of_the_first_call_runs(tmp_path):
    lines = dry_run(1, tmp_path)
    names = (
        "ceilings",
        "smoke",
        "ops compiled",
        "ops",
        "tests",
        "recipe",
        "engine sd3_mid",
        "counters",
        "sanitizer",
        "races",
        "barriers",
    )
    assert steps_of(lines) == dict.fromkeys(names, "ok")
    card = json.loads(lines[0])
    assert card["copy_gb_per_s"] > 0
    assert card["matmul_tflop_per_s"] > 0
    ops = [line for line in lines if line.startswith(("flow_step  ", "flow_logprob  ", "grpo_loss  "))]
    assert {line.split()[-1] for line in ops if " eager " in line} == {"1.0"}, (
        "eager over eager stands last where nothing is compiled"
    )
    assert sum(" cpu " in line and "autograd" not in line for line in ops) == 6, (
        "one case at the first shape, five at the second"
    )
    assert any(line.startswith("branch_mix_flash") and "107+19" in line for line in lines)


@pytest.mark.parametrize(
    "only",
    [
        pytest.param("rows,profile", marks=pytest.mark.long),
        pytest.param("ceilings,ops compiled,ops,engine,tests,rows compiled,scaling", marks=pytest.mark.long),
    ],
)
def test_every_row_of_the_second_call_runs(tmp_path, only):
    lines = dry_run(2, tmp_path, "--only", only)
    assert steps_of(lines) == dict.fromkeys(only.split(","), "ok")
    if "profile" in only:
        assert any(line.startswith("6       ") and "eager" in line for line in lines), (
            "milliseconds of a row of sd3_mid's six blocks"
        )
        assert any(line.startswith("sum of the phases") for line in lines)


def test_a_step_that_fails_hangs_or_is_not_there_stops_no_other(gpu_check, tmp_path):
    steps = [
        gpu_check.Step("fails", 20, ["sh", "-c", "echo WRONG one; exit 3"]),
        gpu_check.Step("hangs", 1, ["sh", "-c", "sleep 60 & echo $!; wait"]),
        gpu_check.Step("missing", 5, [str(tmp_path / "nothing")]),
        gpu_check.Step("works", 20, ["sh", "-c", "echo $COLOUR"], {"COLOUR": "blue"}),
    ]
    began = time.monotonic()
    with (tmp_path / "gpu_check_1.log").open("w") as log:
        found = {
            step.name: gpu_check.run(step, {"PATH": "/usr/bin:/bin"}, log, time.monotonic() + 30) for step in steps
        }
    assert time.monotonic() - began < 20
    assert [found[name].told for name in ("fails", "hangs", "works")] == ["exit 3", "over 1 s", "ok"]
    assert found["missing"].told.startswith("not found")
    assert found["works"].output == "blue\n"
    child = int(found["hangs"].output)
    state = (Path("/proc") / str(child) / "stat") if child else None
    assert state is None or not state.exists() or state.read_text().split()[2] == "Z", (
        "what a step started is ended with it"
    )
    told = "\n".join(gpu_check.report(list(found.values()), tmp_path))
    assert "fails: WRONG one" in told
    assert "===== works" in (tmp_path / "gpu_check_1.log").read_text()


def test_without_time_left_a_step_does_not_start(gpu_check, tmp_path):
    log = io.StringIO()
    log.name = str(tmp_path / "log")
    outcome = gpu_check.run(gpu_check.Step("late", 20, ["touch", str(tmp_path / "made")]), {}, log, time.monotonic())
    assert outcome.told == "no time left"
    assert not (tmp_path / "made").exists()


def test_the_kit_takes_tested_versions_and_knows_its_sources(gpu_kit, monkeypatch, tmp_path):
    versions = gpu_kit.pinned()
    assert all(name.lower().replace("_", "-") in versions for name in gpu_kit.PACKAGES)
    before = gpu_kit.sources_digest()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("")
    monkeypatch.setattr(gpu_kit, "ROOT", tmp_path)
    assert gpu_kit.sources_digest() != before


def test_a_kit_above_its_limit_is_an_error(gpu_kit, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_kit, "KIT", tmp_path)
    (tmp_path / "wheel").write_bytes(bytes(2**20))
    assert gpu_kit.weigh(0.9) == 1
    assert gpu_kit.weigh(1.1) == 0
    assert "1.00 MiB  wheel" in capsys.readouterr().out
