"""The cost of an iteration over leaves and over prompts; `flowgrove bench scaling` that writes
profiling/figures/scaling_MODEL_DEVICE.csv and .png.

`python profiling/bench_scaling.py` takes the options of the command. Run it on an idle machine.
"""

import sys
from pathlib import Path

from flowgrove.cli import app

FIGURES = Path(__file__).parent / "figures"

if __name__ == "__main__":
    app(["bench", "scaling", "--out", str(FIGURES), *sys.argv[1:]])  # the last --out counts
