"""Python programs in processes of their own: they find the packages of this checkout, installed or not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "engine", ROOT / "kernels")
PYTHON = sys.executable
_SCRIPT = Path(sys.executable).with_name("flowgrove")
FLOWGROVE = [str(_SCRIPT)] if _SCRIPT.exists() else [PYTHON, "-m", "flowgrove"]


def environment(**changes: str | None) -> dict[str, str]:
    """That of this process with both source roots first on PYTHONPATH, and with these changes;
    None removes a variable.
    """
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {name: value for name, value in {**os.environ, "PYTHONPATH": path, **changes}.items() if value is not None}


def python(
    *arguments: object, env: dict[str, str | None] | None = None, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments in `environment(**env)`; stdout and stderr are text.
    It has to end well if `check`.
    """
    return subprocess.run(
        [PYTHON, *map(str, arguments)],
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        check=check,
        **options,
    )
