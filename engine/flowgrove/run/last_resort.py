"""What is said of an exception that nobody foresaw: one line, and a file with the rest."""

import platform
import shlex
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, metadata, version

from flowgrove.errors import one_line

_PACKAGES = ("flowgrove", "torch", "diffusers", "transformers", "peft", "safetensors", "pydantic", "triton")


def tell(error: BaseException) -> str:
    """The line for the user. The full trace is written to a file of its own;
    where none can be written it goes to stderr.
    """
    try:
        text = one_line(str(error), 300)
    except Exception:  # a library's exception may not even have a text
        text = ""
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    trace = "".join(traceback.format_exception(error))
    header = [shlex.join(sys.argv), f"python {platform.python_version()} on {platform.platform()}"]
    header += [f"{name} {found}" for name in _PACKAGES if (found := _version(name))]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="flowgrove-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("\n".join([*header, "", trace]))
    except OSError:
        sys.stderr.write(trace)
        return f"{what}; flowgrove did not foresee this: please report it with the trace above{_where()}"
    return f"{what}; flowgrove did not foresee this: please report it with the file {file.name}{_where()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _where() -> str:
    """The address for reports, if the installed package says one."""
    try:
        urls = dict(line.split(", ", 1) for line in metadata("flowgrove").get_all("Project-URL") or [])
    except (PackageNotFoundError, ValueError):
        return ""
    address = urls.get("Issues") or urls.get("Repository")
    return f" at {address}" if address else ""
