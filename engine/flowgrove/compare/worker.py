"""One run of a comparison, in a process of its own: `python -m flowgrove.compare.worker`.

A line of JSON on standard input says what to train; the end of that stream, that whoever has started the process is
gone: the run is then saved and ends, as after a signal.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from flowgrove.compare.goal import Goal
from flowgrove.errors import UserError
from flowgrove.recipe.loading import parse_recipe
from flowgrove.report.lines import whole_lines
from flowgrove.report.page import write_report
from flowgrove.run.folder_lock import FolderLock
from flowgrove.run.last_resort import tell
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer

_WAIT, _LOOK = 120.0, 0.5  # seconds: for another process to end, and between two looks


def train(content: dict[str, Any], out: Path, goal: Goal, stopping: Stopping) -> None:
    """Trains the recipe `content` in the folder `out` until `goal` is reached, and writes the report."""
    asked = Setup(parse_recipe(content))
    lock = _locked(out)  # until the trainer takes it over
    try:
        done = False
        while not done:
            setup = asked.trained_to(goal.iterations(asked, whole_lines(asked.recipe, out)))
            Trainer(setup, out, "auto", stopping, print).run()
            _free_memory()
            done = goal.share(asked, whole_lines(asked.recipe, out)) == 1
        write_report(setup.recipe, out)
    finally:
        lock.release()


def _locked(out: Path) -> FolderLock:
    """The lock of the folder `out`. The process of a comparison that was killed has it until it has saved and ended:
    raises UserError if it still does after two minutes.
    """
    end, told = time.monotonic() + _WAIT, False
    while True:
        try:
            return FolderLock(out)
        except UserError as error:
            if time.monotonic() > end:
                raise
            if not told:
                print(f"waits for up to {_WAIT:.0f} seconds: {error}")
            told = True
            time.sleep(_LOOK)


def _free_memory() -> None:
    """A trainer is a circle of references, and its model stays in memory until it is sought."""
    gc.collect()
    torch.cuda.empty_cache()


def _end_with_the_parent() -> None:
    """Waits for the end of standard input."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Returns the exit code: 0; 2 for what the user can change; 128 + the number of a signal; 1 for anything else."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
    out = Path(asked["out"])
    try:
        with Stopping() as stopping:
            train(asked["recipe"], out, Goal(**asked["goal"]), stopping)
    except UserError as error:
        print(f"error: {error}")
        return 2
    except OSError as error:
        print(f"error: {error.filename or out}: {error.strerror or error}")
        return 2
    except Stopped as stopped:
        return stopped.exit_code
    except (Exception, SystemExit) as error:
        print(f"error: {tell(error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
