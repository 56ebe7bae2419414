"""A pytest plugin for `gpu_check.py`: a file that the environment's FIRST_FAILURES names
gets a line per failed test, as it fails.
"""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that the workers report to writes."""
    path = os.environ.get("FIRST_FAILURES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Teller(path))


class _Teller:
    """Appends the first line of each failure to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for each phase of each test."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = " ".join((crash.message if crash is not None else str(report.longrepr)).split())
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"FAILED {report.nodeid} ({report.when}, {report.duration:.1f} s): {message[:300]}\n")
