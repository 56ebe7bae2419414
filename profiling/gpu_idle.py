"""Where a GPU's time goes in one iteration of branch_mix_flash: busy and idle, the share of the transformer,
the longest gaps and the largest kernels.

    python profiling/gpu_idle.py --model flux_slim --prompts 1

Reads PyTorch's profiler after one iteration to warm up. On a CPU the outermost operators stand for kernels.
"""

import argparse
from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from flowgrove.bench.engine import RECIPES, bench_prompts, bench_recipe
from flowgrove.bench.models import NAMES, bench_model
from flowgrove.device import pick_backend
from flowgrove.iteration import Stages
from flowgrove.machine import describe, pick_device
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.spans import span_totals
from flowgrove.update.updater import Updater


def main() -> None:
    """Prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, default="tiny")
    parser.add_argument("--recipe", choices=list(RECIPES), default="branch_mix_flash")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--cuda-graphs", action="store_true")
    options = parser.parse_args()
    device = pick_device("auto")
    on_gpu = device.type == "cuda"
    with bench_model(options.model, device) as model:
        engine = {"device": device.type, "cuda_graphs": options.cuda_graphs}
        recipe = bench_recipe(model, options.prompts, {"group_size": 16, **RECIPES[options.recipe]}, engine)
        policy = Policy.load(recipe, device)
        stages = Stages(
            Setup(recipe), policy, Updater(recipe, policy, PassRunner.of(recipe, policy)), Rewards(recipe, device)
        )
        texts = bench_prompts(options.prompts)
        with pick_backend(recipe):
            stages.run(texts, 0)
            with span_totals(device) as totals:
                line = stages.run(texts, 0)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            with profile(activities=activities) as profiler:
                stages.run(texts, 0)
                if on_gpu:
                    torch.cuda.synchronize()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = Counter()
    ranges = []
    for event in profiler.events():
        outermost = on_gpu or event.cpu_parent is None or event.cpu_parent.is_user_annotation
        if event.device_type == kind and outermost and not event.is_user_annotation:
            names[event.name] += event.time_range.end - event.time_range.start
            ranges.append((event.time_range.start, event.time_range.end))
    _summary(sorted(ranges), names, line, totals.seconds, describe(device)["device"], options)


def _summary(
    ranges: list[tuple[float, float]], names: Counter, line: dict, totals: dict[str, float], card: str | int, options
) -> None:
    """Prints; times of ranges in microseconds."""
    busy, gaps, reached = 0.0, [], ranges[0][0]
    for start, end in ranges:
        if start > reached:
            gaps.append(start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span, seconds = reached - ranges[0][0], sum(line["seconds"].values())
    transformer = totals.get("transformer", 0.0) + totals.get("backward", 0.0)
    print(
        f"{options.recipe} on {options.model}, {options.prompts} prompts, {card}, "
        f"cuda_graphs {options.cuda_graphs}: {seconds:.3f} s unprofiled"
    )
    print(
        f"transformer {100 * transformer / seconds:.1f} % of it; stages "
        + ", ".join(f"{name} {spent:.3f}" for name, spent in line["seconds"].items())
    )
    print(
        f"profiled: busy {100 * busy / span:.1f} % of {span / 1e6:.3f} s, {len(ranges):,} kernels and copies, "
        f"idle {(span - busy) / 1e3:.1f} ms"
    )
    longest = sorted(gaps, reverse=True)[:5]
    print(
        f"gaps: {len(gaps):,}, of more than 20 us {sum(gap > 20 for gap in gaps)}, longest "
        + ", ".join(f"{gap / 1e3:.2f} ms" for gap in longest)
    )
    for name, spent in names.most_common(6):
        print(f"  {100 * spent / max(busy, 1):5.1f} %  {name[:100]}")


if __name__ == "__main__":
    main()
