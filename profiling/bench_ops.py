"""The ops against the published loops' PyTorch and its compiled form; `flowgrove bench ops` that writes
profiling/figures/ops_DEVICE.csv and .png.

`python profiling/bench_ops.py` takes the options of the command. Run it on an idle machine.
"""

import sys
from pathlib import Path

from flowgrove.cli import app

FIGURES = Path(__file__).parent / "figures"

if __name__ == "__main__":
    app(["bench", "ops", "--out", str(FIGURES), *sys.argv[1:]])  # the last --out counts
