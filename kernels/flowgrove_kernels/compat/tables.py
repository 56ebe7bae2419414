"""Rows of coefficients for every step of a σ table, made once, and the rows of a batch without reading the device.

A table is remembered for as long as the tensor that holds its σ lives and keeps its values: those of a tensor on the
CPU are compared; of one on a GPU, where that would wait for it, writes are counted, which misses those through
`.data`. Making a table reads that tensor once; looking rows up by index or by timestep reads nothing back.
torch.compile breaks its graph here: what is remembered is not traced.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flowgrove_kernels.arguments import is_integer, is_number, wrong
from flowgrove_kernels.coefficients import StepCoefficients

Timestep = float | Tensor | Sequence[float] | Sequence[Tensor]
# (σ, σ', noise level, second entry of the table), the first two float64 [T] → fp32 rows [T]
Rows = Callable[[Tensor, Tensor, float, float], StepCoefficients]
_NEARLY_ONE = 1e-6  # a shifted table misses σ = 1 by fp32 rounding
_SMALLEST = torch.finfo(torch.float64).tiny
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


class BatchSteps(NamedTuple):
    """What the steps of one batch need, on its device: remembered, so nobody gets these tensors themselves. n is 1
    where all rows take the same step.
    """

    coef: StepCoefficients  # [B]
    sigma: Tensor  # fp32 [B]
    std: Tensor  # fp32 [n], standard deviation of the step
    sqrt_dt: Tensor  # fp32 [n], √(σ − σ')


@dataclass(frozen=True)
class StepTable:
    """All steps of one σ table under one dynamics, on one device."""

    columns: Tensor  # fp32 [8, T]: the six coefficients, σ, √(σ − σ')
    _same: dict[tuple[int, int], BatchSteps]

    @torch.compiler.disable
    def at(self, index: int | Tensor, batch: int) -> BatchSteps:
        """The step `index` of every row; an int64 tensor [batch] (or [1], or []) names one for each.

        Raises ValueError for an index outside the table or of another shape.
        """
        if isinstance(index, Tensor):
            return self._each(index, batch)
        if not is_integer(index):
            wrong("index", index, f"pass an int, or an int64 tensor [{batch}]")
        if not 0 <= index < self.columns.shape[1]:
            raise ValueError(f"step {index} is not in the sigma table: write an index in [0, {self.columns.shape[1]})")
        index = int(index)
        if (index, batch) not in self._same:
            self._same[index, batch] = _batch(self.columns[:, index : index + 1], batch)
        return self._same[index, batch]

    def _each(self, index: Tensor, batch: int) -> BatchSteps:
        steps = self.columns.shape[1]
        if index.dtype != torch.int64 or index.shape not in ((), (1,), (batch,)):
            wrong("index", index, f"pass an int, or an int64 tensor [{batch}]")
        if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < steps:
            raise ValueError(f"index holds steps that are not in the sigma table: write indices in [0, {steps})")
        return _batch(self.columns[:, index.reshape(-1).to(self.columns.device, non_blocking=True)], batch)


@torch.inference_mode(False)  # a table outlives the mode in which it is first used, and backward passes read it
def _batch(columns: Tensor, batch: int) -> BatchSteps:
    *coef, sigma, sqrt_dt = columns.expand(-1, batch).contiguous()
    count = columns.shape[1]
    return BatchSteps(StepCoefficients(*coef), sigma, coef[3][:count], sqrt_dt[:count])


@torch.compiler.disable
def step_table(sigmas: Tensor, rows: Rows, noise_level: float, device: torch.device) -> StepTable:
    """The table of `sigmas`, one-dimensional, falling, in [0, 1], on `device`. Raises ValueError for any other."""
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1 or sigmas.shape[0] < 2 or not sigmas.is_floating_point():
        raise ValueError("sigmas is not a table: pass a 1-D float tensor, falling to 0, with one entry more than steps")
    return _remembered(sigmas, (rows, noise_level, device), lambda: _table(sigmas, rows, noise_level, device))


@torch.inference_mode(False)
def _table(sigmas: Tensor, rows: Rows, noise_level: float, device: torch.device) -> StepTable:
    levels = sigmas.detach().to("cpu", torch.float64)
    levels = torch.where((levels - 1).abs() < _NEARLY_ONE, 1.0, levels)
    here, there = levels[:-1], levels[1:]
    if not bool(((there >= 0) & (there < here) & (here <= 1)).all()):
        raise ValueError("sigmas does not fall within [1, 0]: pass the table that the sampling loop uses")
    second = max(float(there[0]), _SMALLEST)  # it is 0 in a table of one step
    coef = rows(here, there, noise_level, second)
    columns = torch.stack([*coef.tensors(), here, (here - there).sqrt()])
    return StepTable(columns.to(device, torch.float32), {})


@torch.compiler.disable
def index_of(timesteps: Tensor, timestep: Timestep, batch: int | None = None) -> int | Tensor:
    """Where `timestep` stands in `timesteps` [T]: an int for one on the host, else int64 [n] on its device.

    Of several equal entries the second counts, as in diffusers. Raises ValueError for one that is not there, which on
    a GPU fails on the device, and unless there are one or `batch` of them.
    """
    wanted = listed(timestep, timesteps).detach().reshape(-1)
    if batch is not None and wanted.shape[0] not in (1, batch):
        raise ValueError(f"timestep lists {wanted.shape[0]}: pass one, or one for each of the {batch} samples")
    if wanted.device.type != "cpu":
        where, found = _positions(timesteps.to(wanted.device, non_blocking=True), wanted)
        torch._assert_async(found.all(), "timestep is not one of scheduler.timesteps")
        return where
    on_host = timesteps if timesteps.device.type == "cpu" else _remembered(timesteps, "host", timesteps.cpu)
    where, found = _positions(on_host, wanted)
    if not bool(found.all()):
        missing = wanted[~found][0].item()
        raise ValueError(f"timestep {missing:g} is not in scheduler.timesteps: call set_timesteps and pass its entries")
    return int(where) if where.numel() == 1 else where


def listed(timestep: Timestep, timesteps: Tensor) -> Tensor:
    """Timesteps, said in any of the ways that trainers do, as a tensor of at most one dimension."""
    if hasattr(timestep, "tolist") and not isinstance(timestep, Tensor):  # NumPy's
        timestep = timestep.tolist()
    values: list[Any] = list(timestep) if isinstance(timestep, list | tuple) else [timestep]
    tensors = [torch.tensor(t, device="cpu") if is_number(t) else t for t in values]
    if len(tensors) == 1 and isinstance(tensors[0], Tensor) and tensors[0].ndim < 2:
        return tensors[0]
    if not all(isinstance(t, Tensor) and t.numel() == 1 for t in tensors):
        wrong("timestep", timestep, "pass an entry of scheduler.timesteps, or one for each sample, [B]")
    return torch.stack([t.reshape(()) for t in tensors]) if tensors else timesteps.new_empty(0)


def _positions(timesteps: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    equal = wanted.unsqueeze(1) == timesteps  # [n, T]
    count = equal.cumsum(1)
    chosen = equal & (count == count[:, -1:].clamp(max=2))
    return chosen.to(torch.int32).argmax(1), equal.any(1)


def _remembered(owner: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
    """What `make` returned for this tensor and name, as long as the tensor is unchanged."""
    on_host = owner.device.type == "cpu"
    if owner.is_inference() and not on_host:  # writes to it are not counted
        return make()
    seen, values = _made.get(owner, (None, None))
    same = seen is not None and (torch.equal(seen, owner) if on_host else seen == owner._version)
    if not same:
        seen, values = owner.detach().clone() if on_host else owner._version, {}
        _made[owner] = seen, values
    if name not in values:
        values[name] = make()
    return values[name]
