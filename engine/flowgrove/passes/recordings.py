"""CUDA graphs: a function of device tensors is recorded once per shape and replayed, so that the host launches one
graph instead of thousands of kernels.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrove.device import is_out_of_memory
from flowgrove.errors import UserError

Tensors = Sequence[Tensor | None]
_MOST = 64  # recordings; the one that was longest out of use goes first
_WARM_UP = 2  # calls before the recording: libraries allocate their workspaces, compilers compile


@dataclass
class _Recorded:
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


class Recordings:
    """One recording per key and shapes of the inputs. All share a memory pool:
    they are replayed one after the other on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._recorded)

    def clear(self) -> None:
        """Gives their memory back."""
        self._recorded.clear()
        if self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()

    @torch.no_grad()
    def __call__(self, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """`function(*inputs)`, copied out of the recording's own tensors.

        `function` is only run when it is recorded: all that changes from call to call must come in as a tensor, and
        `key` must name what else it depends on.
        """
        whole = (key, *((tuple(tensor.shape), tensor.dtype) if tensor is not None else None for tensor in inputs))
        if whole not in self._recorded:
            if len(self._recorded) == _MOST:
                self._recorded.popitem(last=False)
            own = [None if tensor is None else tensor.clone() for tensor in inputs]
            self._recorded[whole] = self._record(function, own)
        self._recorded.move_to_end(whole)
        recorded = self._recorded[whole]
        for place, tensor in zip(recorded.inputs, inputs, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        recorded.replay()
        return [None if tensor is None else tensor.clone() for tensor in recorded.outputs]

    def _leave_pool(self) -> None:
        """Ends what a failed capture leaves begun; the next recording has a pool of its own."""
        if self._pool is not None:
            leave_pool(self.device, self._pool)
        self._pool = torch.cuda.graph_pool_handle()

    def _record(self, function: Callable[..., Tensors], inputs: Tensors) -> _Recorded:
        side = torch.cuda.Stream(self.device) if self._side is None else self._side
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph, caller = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        # the rewards' thread may allocate meanwhile
        recording = torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local")
        try:
            # in `caller`: where the capture's end fails, torch.cuda.graph leaves its own stream current
            with torch.cuda.stream(caller), recording:
                outputs = function(*inputs)
        except RuntimeError as error:
            self._leave_pool()
            if (full := _memory_error(error)) is not None:
                raise full from None
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"engine.cuda_graphs: the model's forward cannot be recorded ({reason}): write engine.cuda_graphs: "
                "false"
            ) from None
        return _Recorded(inputs, outputs, graph.replay)


def leave_pool(device: torch.device, pool: Any) -> None:
    """After a capture into `pool` that has failed: the allocator would take no other recording into it, and put off
    freeing what other streams have used until the capture ends."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # it has ended
        torch._C._cuda_endAllocateToPool(index, pool)


def _memory_error(error: BaseException | None) -> BaseException | None:
    """What was raised for exhausted memory, if that ended the capture: its end then fails with an error of its own."""
    while error is not None and not is_out_of_memory(error):
        error = error.__context__
    return error
