"""Quickstart iterations beside programs that keep the processor busy, for several ways of OpenMP's threads
to wait; writes figures/busy_machine.csv.

    python profiling/busy_machine.py --busy 0,1,2,4

The ways take turns, each in processes of its own. Run it on an idle machine.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# "GNU's default" spins; an empty KMP_BLOCKTIME says nothing to GNU's library and keeps flowgrove from choosing.
WAYS = {
    "GNU's default": {"KMP_BLOCKTIME": ""},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 3000, 10_000)},
}
_PLAIN = ["run.eval_every=0", "run.checkpoint_every=0"]
_BUSY = "while True: pass"


def main() -> None:
    """Prints and writes the median seconds of an iteration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", default="0,1,2,4", help="numbers of busy programs, with commas between")
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas between")
    parser.add_argument("--iterations", type=int, default=6, help="of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "profiling" / "figures" / "busy_machine.csv")
    options = parser.parse_args()
    ways, rows = options.ways.split(","), []
    for count in map(int, options.busy.split(",")):
        spent: dict[str, list[float]] = {way: [] for way in ways}
        with busy(count):
            for _ in range(options.rounds):
                for way in ways:
                    spent[way] += iterations(WAYS[way], options.iterations)
        for way, seconds in spent.items():
            row = {
                "busy_programs": count,
                "waiting": way,
                "median_s": round(statistics.median(seconds), 3),
                "iterations": len(seconds),
            }
            rows.append({**row, "threads": os.cpu_count()})
            print(*rows[-1].values(), flush=True)
        with options.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Inside, `count` programs that never wait."""
    programs = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def iterations(way: dict[str, str], count: int) -> list[float]:
    """Seconds of every iteration but the first."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [word for key in [f"run.iterations={count}", *_PLAIN] for word in ("--set", key)]
        command = [
            sys.executable,
            "-m",
            "flowgrove",
            "train",
            str(ROOT / "recipes" / "quickstart.yaml"),
            *settings,
            "--out",
            f"{folder}/run",
        ]
        paths = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
        subprocess.run(command, env={**os.environ, "PYTHONPATH": paths, **way}, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [sum(json.loads(line)["seconds"].values()) for line in lines if line][1:count]


if __name__ == "__main__":
    main()
