"""Whether the fused ops work at all on this device: every case of the op benchmark on each backend against the formulas in float64, launches counted.

    python profiling/gpu_smoke.py                  # D = 63, 1032, 129,600 and 540,672 on the GPU
    python profiling/gpu_smoke.py --sizes 63,1032  # what compute-sanitizer has patience for

On a GPU each call is also recorded as a CUDA graph, whose replay must return the same bits. Exit code 1 if anything is wrong.
"""

import argparse
import sys

import torch

from flowgrove.bench.cases import CASES, Case, Contender, contenders
from flowgrove.bench.counting import footprint
from flowgrove.bench.inputs import DTYPES, Inputs, find_shape, make_inputs
from flowgrove.bench.machine import pick_device
from flowgrove.bench.ops import available_contenders
from flowgrove.bench.timing import record
from flowgrove_kernels import use_backend


def main() -> None:
    """Prints a line per case and backend; ends with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="63,1032,129600,540672", help="elements of a row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtypes", default="bf16", help=f"out of {','.join(DTYPES)}")
    parser.add_argument("--plain", action="store_true", help="no profiler and no graph: under a tool that counts or checks for itself")
    options = parser.parse_args()
    device = pick_device("auto")
    backends = tuple(name for name in available_contenders(device) if name not in ("eager", "compiled", "reference"))
    if not backends:
        sys.exit("no fused backend is here: build the ops first")
    wrong = 0
    for size in options.sizes.split(","):
        for dtype in options.dtypes.split(","):
            inputs = make_inputs(find_shape(f"{options.rows}x{size}"), dtype, device)
            for case in CASES:
                for contender in contenders(case, inputs, backends):
                    told, fine = _try(case, inputs, contender, options.plain)
                    wrong += not fine
                    print(f"{'ok   ' if fine else 'WRONG'} {contender.name:14} {case.op:12} {case.name:17} D {int(size):>7,} {dtype}  {told}", flush=True)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        print(f"compute capability {major}.{minor}: rows {'may take clusters of blocks' if major >= 9 else 'have no clusters'}; one launch is one pass")
    print(f"smoke: {wrong} wrong")
    sys.exit(bool(wrong))


def _try(case: Case, inputs: Inputs, contender: Contender, plain: bool) -> tuple[str, bool]:
    """(what happened, whether it was right)."""
    try:
        with use_backend(contender.backend or "auto"):
            outputs = contender.run()
        off = [f"{d.output} is off by {d.error:.3g} of {d.tolerance:.3g}" for d in case.check(inputs, outputs, contender) if d.wrong]
        if off or plain:
            return "; ".join(off), not off
        launches = f"{footprint(contender, inputs.device).launches} launches"
        if inputs.device.type != "cuda":
            return launches, True
        graph = record([contender], inputs.device)
        graph.replay()
        same = all(torch.equal(left, right) for left, right in zip(graph.outputs[0], outputs, strict=True))
        return f"{launches}, {'graph replays the same bits' if same else 'its graph replays other bits'}", same
    except Exception as error:  # the other cases still run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", False


if __name__ == "__main__":
    main()
