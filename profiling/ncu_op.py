"""What profiling/ncu.sh measures: one fused op at a named shape, called a few times to warm up and then once inside the
NVTX range that bears its name.

    python profiling/ncu_op.py flow_step --shape flux_720 --dtype bf16 --backend cuda

Prints how many bytes the op has to move, which the counters are read against. On a CPU it runs the same calls.
"""

import argparse
import sys
from collections.abc import Collection

import torch

from flowgrove import machine
from flowgrove.bench.cases import CASES, contenders
from flowgrove.bench.inputs import DTYPES, find_shape, make_inputs
from flowgrove.bench.ops import available_contenders
from flowgrove.errors import UserError
from flowgrove.spans import OPS, span
from flowgrove_kernels import use_backend

_WARM_UP = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs the op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op")
    parser.add_argument("--shape", default="flux_720", help="of `flowgrove bench ops`, or ROWSxELEMENTS")
    parser.add_argument("--dtype", default="bf16", help="of the velocity: bf16 or fp32")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--check", action="store_true", help="only whether it can run here")
    options = parser.parse_args(arguments)
    try:
        device, shape = machine.pick_device("auto"), find_shape(options.shape)
        _one_of("the op", options.op, [case.op for case in CASES])
        _one_of("--dtype", options.dtype, DTYPES)
        _one_of(f"--backend on a {device.type}", options.backend, available_contenders(device)[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    case = next(case for case in CASES if case.op == options.op)
    if options.check:
        return 0
    inputs = make_inputs(shape, options.dtype, device)
    contender = contenders(case, inputs, (options.backend,))[0]
    with use_backend(options.backend):
        for _ in range(_WARM_UP):
            contender.run()
        _wait(device)
        with span(case.op, OPS, shape.rows):
            contender.run()
            _wait(device)
    print(f"{case.op} ({case.name}) at {shape.name}: has to move {case.traffic(inputs):,} bytes")
    return 0


def _one_of(what: str, given: str, known: Collection[str]) -> None:
    if given not in known:
        raise UserError(f"{what} is {given!r}: write one of {', '.join(dict.fromkeys(known))}")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
