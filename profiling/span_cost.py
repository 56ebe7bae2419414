"""What the named ranges cost an iteration while nothing listens: iterations of a small run with them and without, in
turn.

    python profiling/span_cost.py [--model tiny] [--pairs 200]

Writes profiling/figures/span_cost_DEVICE.csv: both medians, and the median of the differences within a pair with its
95 % confidence interval. Run it on an idle machine, without a profiler.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from flowgrove import machine, spans
from flowgrove.bench.models import NAMES, bench_model
from flowgrove.bench.recipes import RECIPES, bench_prompts, bench_recipe, bench_rewards
from flowgrove.bench.table import write_columns
from flowgrove.device import pick_backend
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.models.prompts import Prompts
from flowgrove.models.runner import PassRunner
from flowgrove.setup import Setup
from flowgrove.update.updater import Updater

FIGURES = Path(__file__).parent / "figures"
COLUMNS = (
    "model", "prompts", "pairs", "ranges", "with_ms", "without_ms", "difference_us", "percent", "percent_low",
    "percent_high", "device", "threads", "torch", "triton", "compiler", "date",
)  # fmt: skip
_NOTHING = nullcontext()


@contextmanager
def without_ranges() -> Iterator[None]:
    """Inside the block no code of the engine makes a range, or counts the tokens that one would bear."""
    real, count = spans.span, Prompts.tokens_of
    users = [module for name, module in sys.modules.items() if name.startswith("flowgrove")]
    users = [module for module in users if getattr(module, "span", None) is real]
    for module in users:
        setattr(module, "span", lambda *_, **__: _NOTHING)  # noqa: B010
    setattr(Prompts, "tokens_of", lambda *_: 0)  # noqa: B010
    try:
        yield
    finally:
        for module in users:
            setattr(module, "span", real)  # noqa: B010
        setattr(Prompts, "tokens_of", count)  # noqa: B010


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interval_of_the_median(values: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, from the ranks of `values`: nothing is assumed of how they are spread."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    first = max(math.floor(len(values) / 2 - half), 0)
    return ordered[first], ordered[-1 - first]


def measure(model: str, prompts: int, pairs: int, device_name: str = "auto") -> dict[str, Any]:
    """A row as COLUMNS names it."""
    device = machine.pick_device(device_name)
    with bench_model(model, device) as described:
        recipe = bench_recipe(
            described, prompts, {"group_size": 16, **RECIPES["branch_mix_flash"]}, {"device": device.type}
        )
        policy = Policy.load(recipe, device)
        updater = Updater(recipe, policy, PassRunner.of(recipe, policy))
        stages, texts = Stages(Setup(recipe), policy, updater, bench_rewards(recipe, device)), bench_prompts(prompts)

        def seconds() -> float:
            _wait(device)
            begun = time.perf_counter()
            stages.run(texts, 0)
            _wait(device)
            return time.perf_counter() - begun

        names: Counter[str] = Counter()
        with pick_backend(recipe):
            with spans.listening(lambda one: names.update([one.name]) or _NOTHING):
                stages.run(texts, 0)
            timed: dict[bool, list[float]] = {True: [], False: []}
            for number in range(pairs):
                for ranges in (True, False) if number % 2 else (False, True):  # neither is always the first
                    with nullcontext() if ranges else without_ranges():
                        timed[ranges].append(seconds())
    differences = [a - b for a, b in zip(timed[True], timed[False], strict=True)]
    difference, without = statistics.median(differences), statistics.median(timed[False])
    low, high = interval_of_the_median(differences)
    return {
        "model": model, "prompts": prompts, "pairs": pairs, "ranges": names.total(),
        "with_ms": round(1e3 * statistics.median(timed[True]), 3), "without_ms": round(1e3 * without, 3),
        "difference_us": round(1e6 * difference, 1), "percent": round(100 * difference / without, 3),
        "percent_low": round(100 * low / without, 3), "percent_high": round(100 * high / without, 3),
        **machine.describe(device),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="tiny")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args(arguments)
    row = measure(options.model, options.prompts, options.pairs, options.device)
    place = options.out / f"{machine.file_stem('span_cost', machine.pick_device(options.device))}.csv"
    write_columns([row], COLUMNS, place)
    print(
        f"{row['ranges']} ranges cost {row['difference_us']:.0f} µs of an iteration of {row['without_ms']:.1f} ms: "
        f"{row['percent']:.2f} % (95 %: {row['percent_low']:.2f} to {row['percent_high']:.2f}); wrote {place}"
    )


if __name__ == "__main__":
    main()
