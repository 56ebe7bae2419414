"""The processes of a comparison: each trains one run with one thread, as many at a time as are asked for.

They are of a session of their own, so that a terminal's signals reach this process alone, which passes them on; if it
is killed, the end of their standard input tells them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowgrove.compare.goal import Goal
from flowgrove.compare.runs import Comparison, Run
from flowgrove.run.finding import Say
from flowgrove.run.stopping import Stopping

_LOOK = 0.2  # seconds between two looks at the processes
_COUNT = 2.0  # and between two counts of what they have done


@dataclass(frozen=True)
class Failure:
    """A run that has ended before its goal, and what it said."""

    run: Run
    reason: str


class _Worker:
    """The process of a run."""

    def __init__(self, run: Run, goal: Goal, threads: int | None) -> None:
        self.run = run
        run.log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(place for place in sys.path if place)
        few = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with run.log.open("ab") as log:  # one that still ends, of a comparison that was killed, may write there too
            self._begins = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flowgrove.compare.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **few, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        self._pipe = cast(IO[bytes], self.process.stdin)
        recipe = run.setup.recipe.model_dump(mode="json")
        asked = {"recipe": recipe, "out": str(run.folder), "goal": asdict(goal)}
        with suppress(BrokenPipeError):  # it has ended: its exit code tells
            self._pipe.write(json.dumps(asked).encode() + b"\n")
            self._pipe.flush()

    def end(self, number: int) -> None:
        """Passes a signal on."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def failure(self) -> Failure | None:
        """What went wrong with the run of a process that has ended."""
        with suppress(BrokenPipeError):  # it has ended before it read what was asked
            self._pipe.close()
        if self.process.returncode == 0:
            return None
        with suppress(OSError):
            text = self.run.log.read_bytes()[self._begins :].decode(errors="replace")
            for line in reversed(text.splitlines()):
                if line.startswith("error: "):
                    return Failure(self.run, line.removeprefix("error: "))
        return Failure(self.run, f"its process ended with exit code {self.process.returncode}: see {self.run.log}")


def train_all(
    comparison: Comparison,
    jobs: int,
    threads: int | None,
    stopping: Stopping,
    console: Console,
    say: Say,
    finished: Callable[[], object],
) -> list[Failure]:
    """Trains what is not whole yet, `jobs` runs at a time, each with so many `threads` (None: as many as it takes by
    itself); `finished` is called after each. Returns those that failed.

    When `stopping` has heard a signal, the processes save what they have and end, and no others begin.
    """
    goal = comparison.goal
    waiting = [run for run in comparison.runs if not run.is_whole(goal)]
    if kept := len(comparison.runs) - len(waiting):
        say(f"{kept} of {len(comparison.runs)} runs are there already")
    workers: list[_Worker] = []
    failures: list[Failure] = []
    with _Display(comparison, waiting, console) as display:
        try:
            while workers or (waiting and stopping.request is None):
                while waiting and len(workers) < jobs and stopping.request is None:
                    workers.append(_Worker(waiting.pop(0), goal, threads))
                time.sleep(_LOOK)
                if stopping.request is not None and not display.ending:
                    display.ending = True
                    for worker in workers:
                        worker.end(signal.SIGTERM)  # SIGINT is ignored in what a shell's background job begins
                for worker in [one for one in workers if one.process.poll() is not None]:
                    workers.remove(worker)
                    failure = worker.failure()
                    if stopping.request is not None:
                        continue
                    if failure is not None:
                        failures.append(failure)
                    display.ended(worker.run, failure)
                    finished()
                display.count([worker.run for worker in workers])
        except BaseException:
            for worker in workers:
                worker.end(signal.SIGTERM)
            for worker in workers:  # what follows may begin them anew
                worker.process.wait()
            raise
    return failures


class _Display:
    """A bar on a terminal, and a line for every run that has ended."""

    def __init__(self, comparison: Comparison, waiting: list[Run], console: Console) -> None:
        self.goal, self.total = comparison.goal, len(comparison.runs)
        self.whole = self.total - len(waiting)
        self.ending = False
        self._counted = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("comparing", total=len(waiting))
        self._begun = len(waiting)

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            self._progress.stop()

    def ended(self, run: Run, failure: Failure | None) -> None:
        """Says so in a line."""
        self.whole += failure is None
        self._begun -= 1
        if failure is not None:
            text = f"{run.title}: {failure.reason}"
        else:
            lines = run.lines()
            reward = lines[-1].get("eval_reward")
            told = "held-out reward unknown" if reward is None else f"held-out reward {reward:.3f}"
            text = f"{run.title}: {told} after {len(lines)} iterations"
        with suppress(OSError):
            self._progress.console.print(f"{self.whole} of {self.total} runs  {text}", markup=False)

    def count(self, running: list[Run]) -> None:
        """Moves the bar to what has been done, every other second."""
        if not self._progress.disable and time.monotonic() - self._counted >= _COUNT:
            self._counted = time.monotonic()
            part = sum(self.goal.share(run.setup, run.lines()) for run in running)
            task = self._progress.tasks[0]
            done = (task.total or 0) - self._begun + part
            self._progress.update(self._task, completed=done, description=f"comparing, {len(running)} at a time")
