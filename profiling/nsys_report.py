"""Where the time of a capture of Nsight Systems goes: the table of phases by NVTX range, with the GPU's time in each,
and the gaps in which the GPU waited, by the phase whose launch ended them.

    nsys export --type sqlite capture.nsys-rep
    python profiling/nsys_report.py capture.sqlite [--csv phases.csv]

profiling/nsys.sh makes a capture and prints this. The host's seconds of a phase are those of its ranges without the
ranges inside; launches that lie in no range, as those before the first iteration, are only counted.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from flowgrove.bench.table import write_columns
from flowgrove.errors import UserError
from flowgrove.profiler.nsys import COLUMNS, read_captures
from flowgrove.profiler.nsys_show import draw_capture
from flowgrove.spans import DOMAIN


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each process of the capture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capture", type=Path, help="what `nsys export --type sqlite` has written")
    parser.add_argument("--domain", default=DOMAIN, help="NVTX domain of the ranges")
    parser.add_argument("--csv", type=Path, help="also as a file, a line per process and phase")
    options = parser.parse_args(arguments)
    try:
        captures = read_captures(options.capture, options.domain)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console()
    for capture in captures:
        draw_capture(capture, console)
    if options.csv is not None:
        rows = [{"process": capture.process, **row} for capture in captures for row in capture.table()]
        write_columns(rows, ("process", *COLUMNS), options.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
