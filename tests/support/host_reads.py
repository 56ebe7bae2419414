"""Counts reads of a tensor's value by the host: each would stop the queue of a GPU."""

import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class _Counter(TorchDispatchMode):
    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def count_host_reads(work: Callable[[], object]) -> int:
    """Number of `_local_scalar_dense` calls that `work` makes."""
    with _Counter() as counter:
        work()
    return counter.reads


DEVICE = torch.device("meta")  # stands for a GPU: copies to it and reads of it are seen, nothing is computed
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}
_READS |= {_aten._unique2.default, _aten.repeat_interleave.Tensor}
_STAGED = 1 << 16  # bytes that a driver takes from pageable memory at once, without a wait for the device
_MADE_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class HostWaits(TorchDispatchMode):
    """Notes what would make the host wait for a GPU while tensors on `DEVICE` stand for those there: reads, copies to
    the host, and copies from memory that is not pinned. `recording`: every copy, since no CUDA graph can hold one.

    `noted`: one line each, with the caller's file. A read of a value gives 1, so that the work goes on.
    """

    def __init__(self, recording: bool = False) -> None:
        super().__init__()
        self.recording, self.noted, self._pinned = recording, [], WeakIdKeyDictionary()
        self._functions, self._patches = _Made(self), pytest.MonkeyPatch()

    def __enter__(self):
        def pin_memory(host):
            pinned = host.clone()
            self._pinned[pinned] = True
            return pinned

        self._patches.setattr(Tensor, "pin_memory", pin_memory)
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)
        self._patches.undo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        lies = any(isinstance(leaf, Tensor) and leaf.device == DEVICE for leaf in tree_leaves((args, kwargs)))
        chooses = func is _aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if lies and (chooses or func in _READS):
            self.note(f"reads {func}")
            if func is _aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
        if func is _aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self._copy(args[0], torch.device(kwargs["device"]), kwargs.get("non_blocking", False))
        if func is _aten.copy_.default and args[0].device != args[1].device:
            self._copy(args[1], args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return func(*args, **kwargs)

    def note(self, what: str) -> None:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_stack()]
        file, line = [frame for frame in frames if "/torch/" not in frame[0] and frame[0] != __file__][-1]
        self.noted.append(f"{what} in {file}:{line}")

    def _copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if self.recording:
            self.note("records a copy")
        elif target != DEVICE:
            self.note("copies to the host")
        elif source not in self._pinned and not (non_blocking and source.nbytes <= _STAGED):
            self.note("copies from pageable memory")
        elif not non_blocking:
            self.note("waits for a copy")


class _Made(TorchFunctionMode):
    """Tensors that are made of Python numbers on the device: they come there by a copy that the host waits for."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _MADE_FROM_NUMBERS:
            made_of = args[1] if func is Tensor.new_tensor else (args or tuple(kwargs.values()))[0]
            wanted = kwargs.get("device") or (args[0].device if func is Tensor.new_tensor else None)
            if wanted is not None and torch.device(wanted) == DEVICE and not isinstance(made_of, Tensor):
                self.waits.note("makes a tensor of numbers on the device")
        return func(*args, **kwargs)
