"""`flowgrove profile` of a benchmark's recipe on one of its models, which need no download. Pictures are judged by
their file size alone: leaves that score alike do not train, so that passes may be a few less than the benchmark's.

python profiling/profile_model.py --model flux_slim --prompts 1 --out profiles/flux_slim
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from flowgrove.bench.models import NAMES, bench_model
from flowgrove.bench.recipes import RECIPES, bench_prompts, bench_recipe
from flowgrove.machine import pick_device
from flowgrove.profiler.command import profile_recipe
from flowgrove.profiler.show import draw_profile
from flowgrove.setup import Setup


def main() -> None:
    """Prints the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="tiny")
    parser.add_argument("--recipe", choices=list(RECIPES), default="branch_mix_flash")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the trace and the tables; default: they are not kept")
    options = parser.parse_args()
    device = pick_device("auto")
    engine = {"cuda_graphs": options.cuda_graphs}
    with (
        tempfile.TemporaryDirectory() as folder,
        bench_setup(options.model, options.recipe, options.prompts, device, engine) as setup,
    ):
        out, name = options.out or Path(folder), f"{options.recipe} on {options.model}"
        found = profile_recipe(name, setup, out, options.iterations, 1, lambda line: print(line, file=sys.stderr))
        draw_profile(found, Console(highlight=False))


@contextmanager
def bench_setup(model: str, recipe: str, prompts: int, device: torch.device, engine: dict[str, Any]) -> Iterator[Setup]:
    """The set-up of one of the benchmark's recipes; its files are gone after the block."""
    with bench_model(model, device) as section, tempfile.TemporaryDirectory() as folder:
        rollout = {"group_size": 16, **RECIPES[recipe]}
        made = bench_recipe(section, prompts, rollout, {"device": device.type, **engine})
        file = Path(folder) / "prompts.txt"
        file.write_text("".join(f"{text}\n" for text in bench_prompts(prompts)), encoding="utf-8")
        data = made.data.model_copy(update={"prompts": str(file)})
        yield Setup(made.model_copy(update={"data": data}))


if __name__ == "__main__":
    main()
