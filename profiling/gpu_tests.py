"""A pytest plugin for `gpu_check.py`: failures are told as they come, and tests that compile the same Triton kernels go to the same worker.

A file that the environment's FIRST_FAILURES names gets a line per failed test. Groups leave out the size, which most kernels take as it comes.
"""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that the workers report to writes."""
    config.addinivalue_line("markers", "xdist_group(name): tests that one worker runs")  # where xdist is not installed
    path = os.environ.get("FIRST_FAILURES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Teller(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A group per function and parameters without `size`, for --dist loadgroup."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        rest = [] if parameters is None else [f"{name}={value}" for name, value in sorted(parameters.params.items()) if name not in ("size", "elements")]
        item.add_marker(pytest.mark.xdist_group(f"{item.location[0]}:{getattr(item, 'originalname', item.name)}:{rest}"))


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
