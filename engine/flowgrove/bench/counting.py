"""What one call launches, and how much memory it takes at its peak, out of a profiler trace and of the allocator."""

import json
import os
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flowgrove.bench.cases import Contender
from flowgrove_kernels import use_backend

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints two lines each time

ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_NO_WORK = ("aten::empty", "aten::new_empty", "aten::result_type", "aten::resize_", "aten::lift_fresh", "aten::detach_")


class Footprint(NamedTuple):
    """launches: on a GPU kernels, copies and fills;
    on a CPU calls of ops and of compiled kernels, views and allocations not counted.
    """

    launches: int
    peak_bytes: int  # allocated during the call, at its peak
    output_bytes: int  # of that, what the call returns


def footprint(contender: Contender, device: torch.device) -> Footprint:
    """Runs the contender under the profiler; on a GPU once more for its memory."""
    with use_backend(contender.backend or "auto"):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            outputs = contender.run()
            torch.cuda.synchronize(device)
            peak, size = torch.cuda.max_memory_allocated(device) - before, _size(outputs)
            del outputs
            trace, _ = _traced(contender, device)
            return Footprint(sum(event.get("cat") in ON_THE_DEVICE for event in trace), peak, size)
        trace, size = _traced(contender, device)
        return Footprint(op_calls(trace), _peak(trace), size)


def _traced(contender: Contender, device: torch.device) -> tuple[list[dict[str, Any]], int]:
    """(events of one call, bytes of its outputs)."""
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=not on_gpu) as profiler:
            outputs = contender.run()
            if on_gpu:
                torch.cuda.synchronize(device)
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"], _size(outputs)


def _size(outputs: Iterable[Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = {output.untyped_storage().data_ptr(): output.untyped_storage().nbytes() for output in outputs}
    return sum(storages.values())


def _peak(trace: list[dict[str, Any]]) -> int:
    """The allocator's own total, told at every allocation, over that before the first."""
    told = sorted((event for event in trace if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    if not told:
        return 0
    before = told[0]["args"]["Total Allocated"] - told[0]["args"]["Bytes"]
    return max(0, max(event["args"]["Total Allocated"] for event in told) - before)


def op_calls(trace: list[dict[str, Any]]) -> int:
    """Outermost ops that do work; wrappers (autograd nodes, our ops over PyTorch, compiled regions)
    count as what is inside them.
    """
    events = sorted(
        (event for event in trace if event.get("cat") == "cpu_op"), key=lambda event: (event["ts"], -event["dur"])
    )
    place = 0

    def before(end: float) -> int:
        """What the events that start before `end` are worth."""
        nonlocal place
        found = 0
        while place < len(events) and events[place]["ts"] < end:
            event = events[place]
            place += 1
            found += _worth(event["name"], before(event["ts"] + event["dur"]))
        return found

    return before(float("inf"))


def _worth(name: str, within: int) -> int:
    if name.startswith("aten::"):
        return within if _may_be_a_view(name) else int(not name.startswith(_NO_WORK))
    return max(within, 1) if name.startswith("flowgrove") or "cpp_fused" in name else within


@cache
def _may_be_a_view(name: str) -> bool:
    """Whether it can return its input's memory without writing to it: view, reshape, to, contiguous."""
    schemas = torch._C._jit_get_schemas_for_operator(name)
    return any(
        returned.alias_info is not None and not returned.alias_info.is_write
        for schema in schemas
        for returned in schema.returns
    )
