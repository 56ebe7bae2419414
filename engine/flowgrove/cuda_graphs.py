"""CUDA graphs: a function of device tensors is recorded once per shape and replayed, so that the host launches one graph instead of thousands of kernels."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
_WARM_UP = 2  # calls before the recording: libraries allocate their workspaces, compilers compile


@dataclass
class _Recorded:
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]


class CudaGraphs:
    """One recording per key and shapes of the inputs. All share a memory pool: they are replayed one after the other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._recorded: dict[Hashable, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._recorded)

    @torch.no_grad()
    def __call__(self, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """`function(*inputs)`, copied out of the recording's own tensors.

        `function` is only run when it is recorded: all that changes from call to call must come in as a tensor, and `key` must name what else it depends on.
        """
        whole = (key, *((tuple(tensor.shape), tensor.dtype) if tensor is not None else None for tensor in inputs))
        if whole not in self._recorded:
            own = [None if tensor is None else tensor.clone() for tensor in inputs]
            self._recorded[whole] = self._record(function, own)
        recorded = self._recorded[whole]
        for place, tensor in zip(recorded.inputs, inputs, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        recorded.replay()
        return [None if tensor is None else tensor.clone() for tensor in recorded.outputs]

    def _record(self, function: Callable[..., Tensors], inputs: Tensors) -> _Recorded:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = function(*inputs)
        return _Recorded(inputs, outputs, graph.replay)
