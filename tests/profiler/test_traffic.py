"""The bytes of the fused ops: what the benchmark says that they have to move."""

import pytest
import torch

from flowgrove.bench.cases import CASES, contenders
from flowgrove.bench.inputs import find_shape, make_inputs
from flowgrove.profiler.traffic import traffic_of
from flowgrove.spans import OPS, span
from flowgrove_kernels import use_backend
from policy_cases import CPU


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if "backward" not in case.name or case.op == "grpo_loss"], ids=lambda case: case.op
)
def test_an_op_moves_the_bytes_of_its_tensors_once(case, dtype):
    """The benchmark counts states, velocities and numbers per row; keys and offsets are some 100 bytes more."""
    inputs = make_inputs(find_shape("3x4096"), dtype, CPU)
    ours = contenders(case, inputs, ("reference",))[0]

    def run():
        with use_backend("reference"), span("iteration 0"):
            with span("op", OPS):
                ours.run()
            torch.ones(100).add(1)

    found = traffic_of(run)
    assert set(found) == {"iteration 0/op"}, "PyTorch's own ops do not count"
    assert case.traffic(inputs) <= found["iteration 0/op"] <= case.traffic(inputs) + 400


def test_what_is_compiled_is_compiled_after_it_was_counted():
    """Under a dispatch mode torch.compile would give it up for good, and later passes would run eagerly."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    traffic_of(lambda: compiled(torch.ones(3)))
    assert graphs == []
    compiled(torch.ones(3))
    assert len(graphs) == 1
