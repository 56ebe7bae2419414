"""An iteration of the published loop, at its own batch and sharing, and of Flowgrove with each lever added; `flowgrove
bench engine` that writes profiling/figures/engine_MODEL_DEVICE.csv and .png.

`python profiling/bench_engine.py` takes the options of the command. Run it on an idle machine.
"""

import sys
from pathlib import Path

from flowgrove.cli import app

FIGURES = Path(__file__).parent / "figures"

if __name__ == "__main__":
    app(["bench", "engine", "--out", str(FIGURES), *sys.argv[1:]])  # the last --out counts
