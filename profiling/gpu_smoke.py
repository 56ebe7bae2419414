"""Whether the fused ops work at all on this device: every case of the op benchmark on each backend against
the formulas in float64, launches counted.

    python profiling/gpu_smoke.py                  # D = 63, 1032, 129,600 and 540,672 on the GPU
    python profiling/gpu_smoke.py --sizes 63,1032  # what compute-sanitizer has patience for

On a GPU each call is also recorded as a CUDA graph, whose replay must return the
same bits. Exit code 1 if anything is wrong.
"""

import argparse
import itertools
import sys

import torch

from flowgrove.bench.cases import CASES, Case, Contender, contenders
from flowgrove.bench.counting import footprint
from flowgrove.bench.inputs import DTYPES, Inputs, find_shape, make_inputs
from flowgrove.bench.ops import available_contenders
from flowgrove.bench.timing import record
from flowgrove.machine import pick_device
from flowgrove_kernels import NoiseKey, flow_step, grpo_loss_and_grad, step_coefficients, use_backend

# Of each row: more than a pass of the loss takes, and more than its shared memory has slopes for.
CHILDREN = (14, 0, 70, 3)
MODES = ("density", "guard", "kl")
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def main() -> None:
    """Prints a line per case and backend; ends with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="63,1032,129600,540672", help="elements of a row")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dtypes", default="bf16", help=f"out of {','.join(DTYPES)}")
    parser.add_argument("--backends", help="default: every fused one that takes tensors of this device")
    parser.add_argument("--ops", default=",".join(OPS), help="whose cases run")
    parser.add_argument(
        "--families", action="store_true", help="also the loss of rows with 14, 0, 70 and 3 children, in every mode"
    )
    parser.add_argument(
        "--plain", action="store_true", help="no profiler and no graph: under a tool that counts or checks for itself"
    )
    options = parser.parse_args()
    device = pick_device("auto")
    backends = tuple(name for name in available_contenders(device) if name not in ("eager", "compiled", "reference"))
    if not backends:
        sys.exit("no fused backend is here: build the ops first")
    if options.backends and not set(options.backends.split(",")) <= set(backends):
        sys.exit(f"--backends {options.backends}: write some of {','.join(backends)}, which run here")
    if not set(options.ops.split(",")) <= set(OPS):
        sys.exit(f"--ops {options.ops}: write some of {','.join(OPS)}")
    backends = tuple(name for name in backends if not options.backends or name in options.backends.split(","))
    cases = [case for case in CASES if case.op in options.ops.split(",")]
    wrong = 0
    for size in options.sizes.split(","):
        for dtype in options.dtypes.split(","):
            inputs = make_inputs(find_shape(f"{options.rows}x{size}"), dtype, device)
            for case in cases:
                for contender in contenders(case, inputs, backends):
                    told, fine = _try(case, inputs, contender, options.plain)
                    wrong += not fine
                    what = f"{contender.name:14} {case.op:12} {case.name:17} D {int(size):>7,} {dtype}"
                    print(f"{'ok   ' if fine else 'WRONG'} {what}  {told}", flush=True)
        for mode in MODES if options.families else ():
            for backend in backends:
                told = _try_family(mode, int(size), backend, device)
                wrong += bool(told)
                what = f"{backend:14} grpo_loss    {CHILDREN} {mode:10} D {int(size):>7,} fp32"
                print(f"{'WRONG' if told else 'ok   '} {what}  {told}", flush=True)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        clusters = "may take clusters of blocks" if major >= 9 else "have no clusters"
        print(f"compute capability {major}.{minor}: rows {clusters}; one launch is one pass")
    print(f"smoke: {wrong} wrong")
    sys.exit(bool(wrong))


def _try_family(mode: str, size: int, backend: str, device: torch.device) -> str:
    """What is wrong with the loss of rows whose children take several passes,
    against the reference; nothing if it is right.
    """
    try:
        found, expected = (_family(mode, size, name, device) for name in (backend, "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    except Exception as error:  # the other modes still run
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _family(mode: str, size: int, backend: str, device: torch.device) -> list[torch.Tensor]:
    """Outputs and gradient of grpo_loss_and_grad."""
    draw = torch.Generator(device).manual_seed(0)
    rows, edges = len(CHILDREN), sum(CHILDREN)
    parent = torch.repeat_interleave(torch.arange(rows), torch.tensor(CHILDREN))
    x, v, v_ref = (torch.randn(rows, size, device=device, generator=draw) for _ in range(3))
    levels = torch.linspace(0.9, 0.5, rows + 1, dtype=torch.float64)
    coef = step_coefficients("dance_sde", levels[:-1], levels[1:], noise_level=0.3).to(device)
    key = NoiseKey(1, 2, 3, 4, torch.arange(edges), parent).packed(edges, device)
    advantage, weight = (
        torch.randn(edges, device=device, generator=draw),
        torch.full((edges,), 1 / edges, device=device),
    )
    options = {"guard": {"ratio": "guard", "key": key}, "kl": {"v_ref": v_ref, "kl_weight": 0.1}}.get(mode, {})
    with use_backend("reference"):
        apart = parent.to(device)
        x_next, old_logp = flow_step(x[apart], v[apart] + 0.01, coef[apart], key=key)
    offsets = torch.tensor([0, *itertools.accumulate(CHILDREN)], device=device)
    with use_backend(backend):
        result, gradient, _ = grpo_loss_and_grad(
            x, v, x_next, coef, old_logp, advantage, weight, clip_range=0.2, child_offsets=offsets, **options
        )
    return [result.loss, result.logp, result.ratio, result.kl, gradient * size]


def _try(case: Case, inputs: Inputs, contender: Contender, plain: bool) -> tuple[str, bool]:
    """(what happened, whether it was right)."""
    try:
        with use_backend(contender.backend or "auto"):
            outputs = contender.run()
        off = [
            f"{d.output} is off by {d.error:.3g} of {d.tolerance:.3g}"
            for d in case.check(inputs, outputs, contender)
            if d.wrong
        ]
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
