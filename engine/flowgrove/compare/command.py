"""`flowgrove compare`: trains what is missing, and writes tables and picture of all that is there."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from flowgrove.compare.curves import Curve, Reached, curve_of, summarise
from flowgrove.compare.judging import keep_judged
from flowgrove.compare.picture import draw_curves
from flowgrove.compare.processes import Failure, train_all
from flowgrove.compare.runs import Comparison, cores, rate_text
from flowgrove.compare.searched import keep_searched, searched
from flowgrove.compare.tables import write_tables
from flowgrove.device import pick_device
from flowgrove.errors import UserError
from flowgrove.machine import device_name
from flowgrove.run.finding import Say
from flowgrove.run.folder_lock import FolderLock
from flowgrove.run.stopping import Stopped, Stopping


@dataclass(frozen=True)
class Result:
    """All that is in the folder of a comparison."""

    curves: list[Curve]
    found: list[Reached]
    failures: list[Failure]
    machine: str


def compare(comparison: Comparison, jobs: int | None, say: Say, console: Console) -> Result:
    """Trains the runs of a comparison that are not whole, `jobs` at a time (None: on a CPU one per core, on a GPU one),
    those that choose learning rates first where it searches, and writes curves.csv, summary.csv and rewards.png into
    its folder, which no other may have meanwhile.

    Raises Stopped, with the tables and the picture of what there is, after a signal.
    """
    device = pick_device(comparison.runs[0].setup.recipe)
    on_cpu = all(pick_device(run.setup.recipe).type == "cpu" for run in comparison.runs)
    threads = 1 if on_cpu else None
    machine = f"{device_name(device)}, {'one thread a run, ' if on_cpu else ''}torch {torch.__version__}"
    lock = FolderLock(comparison.out)
    try:
        with Stopping() as stopping:
            stopping.hold()
            keep_judged(comparison.out, comparison.runs[0].setup)
            at_once = jobs or (cores() if on_cpu else 1)

            def train(some: Comparison) -> list[Failure]:
                return train_all(
                    some, at_once, threads, stopping, console, say, lambda: _write_tables(comparison, machine)
                )

            part, failures = comparison, list[Failure]()
            if comparison.search is not None:
                part = comparison.searching()
                failures += train(part)
                search = searched(comparison, [curve_of(run) for run in part.runs])
                if search is not None and stopping.request is None:
                    keep_searched(comparison, search)
                    part = comparison.of_rates(search.rates)
                    told = ", ".join(f"{name} {rate_text(rate)}" for name, rate in search.rates.items())
                    say(f"the best learning rates of seed {comparison.runs[0].seed}: {told or 'none'}")
            if stopping.request is None:
                failures += train(part)
            curves, found = _write_tables(comparison, machine)
            picture = comparison.out / "rewards.png"
            if found:
                draw_curves(curves, found, picture)
            else:
                picture.unlink(missing_ok=True)  # it is of less cost
            if stopping.request is not None:
                whole = sum(run.is_whole(part.goal) for run in part.runs)
                say(f"{whole} of {len(part.runs)} runs are whole: the same command goes on with the others")
                raise Stopped(stopping.request)
    finally:
        lock.release()
    return Result(curves, found, failures, machine)


def check(failures: list[Failure], runs: int) -> None:
    """Raises UserError if some runs have failed."""
    if failures:
        first = failures[0]
        more = f" (and {len(failures) - 1} of the others, see their logs)" if len(failures) > 1 else ""
        raise UserError(f"{len(failures)} of {runs} runs failed: {first.run.title}: {first.reason}{more}")


def _write_tables(comparison: Comparison, machine: str) -> tuple[list[Curve], list[Reached]]:
    curves = [curve_of(run) for run in comparison.runs]
    found = summarise(curves, comparison.axis, comparison.costs, searched(comparison, curves))
    write_tables(curves, found, machine, comparison.out)
    return curves, found


def written(out: Path, found: list[Reached]) -> str:
    """A line that says what there is."""
    picture = " and rewards.png" if found else ""
    return f"wrote summary.csv, curves.csv{picture} in {out}; the runs: flowgrove watch {out / 'runs'}/*/"
