"""What a row of a transformer pass costs; `flowgrove bench rows` that writes profiling/figures/rows_MODEL_DEVICE.csv.

`python profiling/bench_rows.py` takes the options of the command. Run it on an idle machine.
"""

import sys
from pathlib import Path

from flowgrove.cli import app

FIGURES = Path(__file__).parent / "figures"

if __name__ == "__main__":
    app(["bench", "rows", "--out", str(FIGURES), *sys.argv[1:]])  # the last --out counts
