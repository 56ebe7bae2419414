"""What is read from a trace: launches, waits and idle gaps by phase, on made-up traces whose answers are known and on
real ones of a CPU.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from flowgrove.bench.counting import op_calls
from flowgrove.profiler.events import Busy, Trace
from flowgrove.profiler.gaps import Gaps, idle
from flowgrove.profiler.phases import BETWEEN
from flowgrove.spans import span

MAIN, AUTOGRAD, REWARDS, LATER = 1, 2, 3, 7


def event(cat, name, start, end, thread=MAIN, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": thread, "args": args}


def on_gpu(name, start, end, call, cat="kernel"):
    """Of stream 7, launched by the call of that number."""
    return event(cat, name, start, end, LATER, correlation=call)


RANGES = [
    event("user_annotation", "iteration 5", 0, 100),
    event("user_annotation", "iteration 5/rollout", 0, 40),
    event("user_annotation", "iteration 5/rollout/step 0", 5, 30),
    event("user_annotation", "iteration 5/rollout/step 0/transformer", 10, 20),
    event("user_annotation", "iteration 5/update", 50, 90),
    event("user_annotation", "iteration 5/update/update 0", 50, 90),
    event("user_annotation", "iteration 5/update/update 0/backward", 60, 80),
    event("user_annotation", "iteration 5/reward/decode", 25, 65, REWARDS),
    event("user_annotation", "Optimizer.step#AdamW.step", 58, 70),
    event("user_annotation", "a hook's own/range", 9, 21),
]
CALLS = [
    event("cuda_runtime", "cudaLaunchKernel", 11, 12, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 13, 14, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 32, 33, correlation=3),
    event("cuda_runtime", "cudaStreamSynchronize", 33, 35),
    event("cuda_runtime", "cudaLaunchKernel", 61, 62, AUTOGRAD, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", 62, 63, REWARDS, correlation=5),
    event("cuda_runtime", "cudaEventSynchronize", 63, 64, REWARDS),
    event("cuda_runtime", "cudaEventRecord", 64, 65),
    event("cuda_runtime", "cudaDeviceSynchronize", 101, 102),  # the profiler's own
    event("cuda_runtime", "cudaLaunchKernel", 103, 104, correlation=6),
]
WORK = [
    on_gpu("gemm", 20, 30, 1),
    on_gpu("flow_step", 28, 36, 2),  # beside it, on another stream
    on_gpu("Memcpy DtoH", 40, 41, 3, "gpu_memcpy"),
    on_gpu("gemm", 71, 80, 4),
    on_gpu("conv", 130, 140, 5),
    on_gpu("after", 200, 210, 6),
]


@pytest.fixture
def trace():
    return Trace([*RANGES, *WORK, *CALLS, {"ph": "M", "name": "process_name"}])


def test_work_of_a_gpu_belongs_to_the_phase_that_launched_it(trace):
    assert trace.on_gpu
    assert trace.busy == [
        Busy(20, 30, "rollout/transformer"),
        Busy(28, 36, "rollout/transformer"),
        Busy(40, 41, "rollout/other"),
        Busy(71, 80, "update/backward"),
        Busy(130, 140, "reward/decode"),
    ]
    assert trace.launches() == {
        "rollout/transformer": 2, "rollout/other": 1, "update/backward": 1, "reward/decode": 1,
    }  # fmt: skip


def test_the_heaviest_work_is_summed_by_name(trace):
    assert trace.heaviest() == {"gemm": 19, "conv": 10, "flow_step": 8, "Memcpy DtoH": 1}


def test_waits_are_calls_that_stop_the_host_and_the_profilers_own_is_none_of_them(trace):
    assert trace.waits() == {"rollout/other": 1, "reward/decode": 1}


def test_gaps_lie_where_the_work_is_that_ends_them(trace):
    found = idle(trace.busy)
    assert (found.span, found.busy) == (120, 16 + 1 + 9 + 10)
    assert found.gaps == {
        "rollout/other": Gaps(1, 0, 4, 4),
        "update/backward": Gaps(1, 1, 30, 30),
        "reward/decode": Gaps(1, 1, 50, 50),
    }
    assert sum(gaps.total for gaps in found.gaps.values()) == found.span - found.busy


def test_work_that_overlaps_or_touches_leaves_no_gap():
    assert idle([]).span == 0
    found = idle([Busy(3, 4, "b"), Busy(0, 10, "a"), Busy(10, 12, "a")])
    assert (found.span, found.busy, found.gaps) == (12, 12, {})


def test_stages_and_seconds_are_those_of_the_iteration(trace):
    assert trace.stages(10) == [("rollout", -10e-6, 30e-6), ("update", 40e-6, 80e-6)]
    assert trace.seconds == pytest.approx(100e-6)


def test_on_a_cpu_ops_and_reads_are_counted_in_their_phase(tmp_path):
    x = torch.ones(3, 3, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        x.exp()  # in no iteration
        with span("iteration 0"):
            with span("rollout"), span("step 0"), span("transformer"):
                y = (x @ x).view(9).sum()
            with span("update"), span("update 0"), span("backward"):
                y.backward()
            y.detach().item()
    path = tmp_path / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    trace = Trace.read(path)
    assert not trace.on_gpu
    found = trace.launches()
    assert found["rollout/transformer"] == 2, "a product and a sum; views do no work"
    assert found["update/backward"] >= 2
    assert set(found) <= {"rollout/transformer", "update/backward", BETWEEN}
    everything = op_calls([one for one in trace.events if one.get("cat") == "cpu_op"])
    assert sum(found.values()) == everything - 1, "all but the exponential"
    assert trace.waits() == {BETWEEN: 1}
    assert trace.busy == []
    assert {"aten::matmul", "aten::sum"} <= set(trace.heaviest())
    assert "aten::exp" not in trace.heaviest(), "it lies in no iteration"
