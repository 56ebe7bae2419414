"""Weights that are divided among ranks, by PyTorch's FSDP2 (`fully_shard`), and gathered where passes need them.

Divided are the weights of linear and convolution layers, which are nearly all of a transformer: rows of their first
dimension, in fp32 where they train. What is small stays whole on every rank: norms, tables, LoRA layers.

A rollout runs gathered: all weights come once, so that no pass of it waits for another rank, and ranks need not agree
on passes. In an update every pass is a meeting of all ranks, because its gradients are added up on the way back; the
weights stay gathered until they change, or, with `reshard_after_forward`, no longer than their block computes.
"""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flowgrove.models.blocks import blocks_of
from flowgrove.models.experts import parts_of
from flowgrove.models.masters import Piece, is_rounded


class ShardedTransformer:
    """A transformer whose large weights are divided over the last dimension of `mesh`; a first dimension of it, if
    there is one, counts copies of the division (HSDP).

    The transformer comes in host memory and goes to `device` block by block: no more than one block of it is ever whole
    in the dtype that `stored_as` gives a weight. Passes read the divided weights in `compute`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        mesh: DeviceMesh,
        device: torch.device,
        compute: torch.dtype,
        stored_as: Callable[[nn.Parameter], torch.dtype],
    ) -> None:
        self._mesh = mesh
        self._shards = mesh["shard"].get_group() if mesh.ndim > 1 else mesh.get_group()
        shapes, whole = {}, set()
        for name, parameter in transformer.named_parameters():
            if _divides(transformer, name, stored_as(parameter) == compute):
                shapes[name] = parameter.shape
            else:
                whole.add(parameter)
        master = torch.float64 if compute == torch.float64 else torch.float32
        precision = MixedPrecisionPolicy(
            param_dtype=compute if compute != master else None, reduce_dtype=master, cast_forward_inputs=False
        )
        # an expert apart from the other one, of which a pass needs nothing
        experts = parts_of(transformer) if parts_of(transformer) != [transformer] else []
        for unit in (*blocks_of(transformer), *experts, transformer):
            for parameter in unit.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(device, stored_as(parameter), copy=True)
            for buffer in unit.buffers():
                buffer.data = buffer.data.to(device)
            fully_shard(unit, mesh=mesh, mp_policy=precision, ignored_params=whole)
        # nothing writes into a velocity
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._root = cast(FSDPModule, transformer)
        self._around = [cast(FSDPModule, unit) for unit in (*experts, transformer)]
        self._units = [module for module in transformer.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:  # gradients are sums, not means; neither setting is recursive
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
        parameters = dict(transformer.named_parameters())
        self._divided = {name: cast(DTensor, parameters[name]) for name in shapes}
        rank, self.ranks = dist.get_rank(self._shards), dist.get_world_size(self._shards)
        self.pieces = {
            name: Piece(shape, min(shape[0], rank * -(-shape[0] // self.ranks)))
            for name, shape in shapes.items()
            if self._divided[name].requires_grad
        }
        # what optimisers, averages and checkpoints see: this rank's rows as plain tensors, in the storage of FSDP's own
        self.masters = {
            name: nn.Parameter(divided.to_local().detach())
            for name, divided in self._divided.items()
            if divided.requires_grad
        }

    @property
    def of_first_copy(self) -> bool:
        """Whether this rank's rows belong to the first copy of the division, or the only one."""
        return self._mesh.ndim == 1 or self._mesh.get_local_rank(0) == 0

    def gather(self) -> None:
        """Makes all weights whole until they are freed: a pass then waits for nobody. All ranks do."""
        self.keep(True)
        for unit in self._units:
            unit.unshard()

    def free(self) -> None:
        """Lets go of what was gathered."""
        for unit in self._units:
            unit.reshard()

    def keep(self, gathered: bool) -> None:
        """Whether weights that a pass has gathered stay until they are freed."""
        self._root.set_reshard_after_forward(not gathered)
        for unit in self._around:  # what is around the blocks is needed first again
            unit.set_reshard_after_forward(False, recurse=False)
        self._root.set_reshard_after_backward(not gathered)
        # FSDP writes down every forward until a backward, and so without end of a model that has none, or in a rollout
        for unit in self._units:
            state = unit._get_fsdp_state()
            for group in _groups_of(state):
                getattr(group.comm_ctx, "post_forward_order", []).clear()  # not there before the first forward
                group._post_forward_indices.clear()

    def reduce_copies(self, last: bool) -> None:
        """Whether the backward to come is the last one before gradients are taken: only then copies of the division add
        up theirs.
        """
        if self._mesh.ndim > 1:
            self._root.set_requires_all_reduce(last)

    def take_gradients(self) -> None:
        """What backwards have left becomes the masters' gradients."""
        for name, master in self.masters.items():
            gradient = cast("DTensor | None", self._divided[name].grad)
            master.grad = None if gradient is None else gradient.to_local()
            self._divided[name].grad = None

    def drop_gradients(self) -> None:
        """Forgets them."""
        for name, master in self.masters.items():
            self._divided[name].grad = master.grad = None

    def norm(self, mine: Tensor) -> Tensor:
        """√(Σ mine²) over the ranks among which weights are divided, added up in their order on each: the same bits
        everywhere, copies included. On the device, without a wait by the host.
        """
        every = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(every, mine, group=self._shards)
        return torch.stack(every).square().sum().sqrt()


def _groups_of(state: Any) -> list[Any]:
    """The groups of weights of one unit; before torch 2.12 a unit has one at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    return [group for group in (groups if groups is not None else [state._fsdp_param_group]) if group is not None]


def _divides(transformer: nn.Module, name: str, as_computed: bool) -> bool:
    """Whether a weight is divided: one of a linear or convolution layer that passes read in the compute dtype, as they
    do where it trains or lies `as_computed`; LoRA layers are not.
    """
    if not is_rounded(transformer, name):
        return False
    if transformer.get_parameter(name).requires_grad:
        return not hasattr(transformer, "peft_config")
    return as_computed
