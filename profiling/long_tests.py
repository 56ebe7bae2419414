"""Writes tests/LONG.md: when, where and on which versions all tests last ran, and what came out.

`make test-long` ends with it: python profiling/long_tests.py RESULTS.xml ...; the files are pytest's (JUnit).
"""

import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "tests" / "LONG.md"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "peft", "pytest")
LONGEST = 20  # tests with a row of their own


@dataclass(frozen=True)
class Result:
    """One test: its name, how it ended (passed, failed, skipped), why, its seconds, and what it has told of itself."""

    name: str
    outcome: str
    why: str
    seconds: float
    told: tuple[tuple[str, str], ...]


def read_results(file: Path) -> tuple[str, float, list[Result]]:
    """When the tests of a file began (date and time), the seconds that all took together, and each of them."""
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    results = [_result(case) for suite in suites for case in suite.iter("testcase")]
    return min(s.get("timestamp", "") for s in suites), sum(float(s.get("time", 0)) for s in suites), results


def _result(case: ElementTree.Element) -> Result:
    outcome, why = "passed", ""
    for kind, name in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
        if (found := case.find(kind)) is not None:
            outcome, why = name, (found.get("message") or "").strip()
    told = tuple((one.get("name", ""), one.get("value", "")) for one in case.iter("property"))
    name = f"{case.get('classname', '').removeprefix('tests.')}: {case.get('name')}"
    return Result(name, outcome, why, float(case.get("time", 0)), told)


def page(files: list[Path]) -> str:
    """The page, in Markdown."""
    read = [read_results(file) for file in files]
    results = [result for _, _, some in read for result in some]
    count = Counter(result.outcome for result in results)
    began = min(began for began, _, _ in read)[:16].replace("T", " ")
    outcome = ", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    lines = [
        "# All tests",
        "",
        "`make test-long` has written this page; nobody edits it.",
        "",
        "| | |",
        "|---|---|",
        f"| begun | {began} |",
        f"| commit | {_commit()} |",
        f"| machine | {_processor()}, {os.cpu_count()} cores, {_memory():.0f} GiB; {platform.system()} |",
        f"| versions | Python {platform.python_version()}, {', '.join(_versions())} |",
        f"| tests | {outcome} |",
        f"| took | {_duration(sum(seconds for _, seconds, _ in read))} |",
    ]
    failed = [result for result in results if result.outcome == "failed"]
    lines += _section("Failed", [f"- {_code(r.name)}: {_one_line(r.why)}" for r in failed])
    told = [f"- {_code(r.name)}: {key}: {value}" for r in results for key, value in r.told]
    lines += _section("What tests have measured", told)
    reasons = Counter(_one_line(result.why) for result in results if result.outcome == "skipped")
    lines += _section("Skipped", [f"- {number}: {reason}" for reason, number in sorted(reasons.items())])
    slow = sorted(results, key=lambda result: -result.seconds)[:LONGEST]
    rows = [f"| {_code(result.name)} | {result.seconds:.0f} |" for result in slow]
    lines += _section("The longest", ["| test | seconds |", "|---|---|", *rows])
    return "\n".join(lines) + "\n"


def _section(title: str, lines: list[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _code(name: str) -> str:
    return "`" + name.replace("|", "/").replace("`", "'") + "`"


def _one_line(text: str) -> str:
    """Without the folders of the machine that ran the tests."""
    for folder, name in ((str(ROOT), "."), (tempfile.gettempdir(), "TMP")):
        text = text.replace(folder, name)
    return " ".join(text.split())[:300]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        told = []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float:
    """GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    PAGE.write_text(page([Path(argument) for argument in sys.argv[1:]]), encoding="utf-8")
