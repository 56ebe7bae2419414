"""One run of a comparison, in a process of its own: `python -m flowgrove.compare.worker`.

A line of JSON on standard input says what to train; the end of that stream, that whoever has started the process is
gone: the run is then saved and ends, as after a signal.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from flowgrove.compare.goal import Goal
from flowgrove.errors import UserError
from flowgrove.recipe.loading import parse_recipe
from flowgrove.report.lines import whole_lines
from flowgrove.report.page import write_report
from flowgrove.run.last_resort import tell
from flowgrove.run.stopping import Stopped, Stopping
from flowgrove.setup import Setup
from flowgrove.trainer import Trainer


def train(content: dict[str, Any], out: Path, goal: Goal, stopping: Stopping) -> None:
    """Trains the recipe `content` in the folder `out` until `goal` is reached, and writes the report."""
    asked = Setup(parse_recipe(content))
    done = False
    while not done:
        setup = asked.trained_to(goal.iterations(asked, whole_lines(asked.recipe, out)))
        Trainer(setup, out, "auto", stopping, print).run()
        done = goal.share(asked, whole_lines(asked.recipe, out)) == 1
    write_report(setup.recipe, out)


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
