"""The weights of a policy: what trains, its fp32 masters, and the reference model. They change through here alone."""

import copy
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowgrove.models.attention import with_attention
from flowgrove.models.checkpointing import checkpoint_blocks
from flowgrove.models.experts import parts_of, trained_parts
from flowgrove.models.float64 import keep_float64
from flowgrove.models.frozen_base import compress
from flowgrove.models.initial_lora import InitialLora
from flowgrove.models.masters import Masters, Piece, is_rounded
from flowgrove.models.narrowing import narrow_states
from flowgrove.models.quantised import Precision, QuantisedCopy
from flowgrove.models.trainable import choose_trainable
from flowgrove.models.twins import Twin
from flowgrove.ranks import Ranks
from flowgrove.recipe.schema import Recipe
from flowgrove.spans import COMMUNICATION, span

if TYPE_CHECKING:  # half a second that a run on one device does not need
    from torch.distributed.device_mesh import DeviceMesh

    from flowgrove.models import sharding


class Weights:
    """A loaded transformer, made ready for training: whatever trains has fp32 masters (float64 for model.dtype fp64).

    With `compute` bf16 and `passes` the passes read bf16 copies of them; `passes` False: nothing will run, so that the
    transformer's own parameters stay the masters. `trains` False: the policy only draws, and what would be the copies
    of masters is all there is. With `ranks` that have a mesh the large weights are divided among them: the transformer
    comes in host memory and goes to `device`, as one does whose frozen weights are rounded (model.base_precision), or
    that only draws. Raises UserError for LoRA targets that match no layer.
    """

    def __init__(
        self,
        recipe: Recipe,
        transformer: Any,
        lora_targets: tuple[str, ...],
        compute: torch.dtype,
        passes: bool,
        device: torch.device,
        ranks: Ranks | None = None,
        trains: bool = True,
    ) -> None:
        lora, master = recipe.model.lora, torch.float64 if compute == torch.float64 else torch.float32
        self.transformer, self._ranks = transformer, ranks or Ranks()
        mesh = self._ranks.mesh
        parts, initial = trained_parts(transformer), InitialLora.of(recipe.model, transformer)
        for start, own in initial.items():
            if not recipe.model.trains_initial_lora:
                own.merge(parts[start])
        if recipe.model.base_precision is not None:
            compress(transformer, recipe.model.base_precision, compute, device)
        if master == torch.float64:
            keep_float64(transformer)
        if compute == torch.bfloat16:
            narrow_states(transformer)
        copies = compute == torch.bfloat16 and passes and (mesh is None or lora is not None)
        rounds = copies and mesh is None and not trains
        if rounds and lora is None:
            self._bring_rest(device)
        self.reference_copy: Any = None  # frozen; LoRA needs none: without it the model is the reference
        if lora is None and recipe.uses_reference:
            self.reference_copy = self._frozen_copy(compute, device, divided=mesh is not None)
        choose_trainable(transformer, lora, lora_targets, recipe.run.seed)
        checkpoint_blocks(transformer, recipe.model.gradient_checkpointing, recipe.engine.compile)
        # the transformer and the reference copy, where ranks divide them
        self.sharded: list[sharding.ShardedTransformer] = []
        # whether training passes free what they have gathered
        self.reshards = recipe.engine.reshard_after_forward is not False
        if mesh is not None:
            self._divide(mesh, device, compute, master)
        else:
            self._store(device, compute if rounds else master, master)
        self._masters = Masters(transformer, compute) if copies and not rounds else None
        self._first = next(iter(self.trainable().values()))
        self._compute = compute
        self._cheap: Twin | None = None
        # of layers that start from others, what the reference model has in their place
        self.initial: dict[str, Tensor] = {}
        if initial and lora is not None and recipe.model.trains_initial_lora:
            started = {start: own.start(parts[start], lora) for start, own in initial.items()}
            self.load({f"{start}{name}": tensor for start, some in started.items() for name, tensor in some.items()})
            if recipe.uses_reference:
                self.initial = {name: p.detach().clone() for name, p in self._adapted()}

    @property
    def pieces(self) -> dict[str, Piece]:
        """Of the trained weights that are divided among ranks, this rank's parts; the others are whole on each."""
        return self.sharded[0].pieces if self.sharded else {}

    def _bring_rest(self, device: torch.device) -> None:
        """Of a transformer that may lie in host memory, as its files hold it, all but the weights that a checkpoint has
        goes to `device`; buffers are in fp32, as where weights come in fp32.
        """
        trained = trained_parts(self.transformer).values()
        for part in parts_of(self.transformer):
            if all(part is not one for one in trained):
                part.to(device)
                continue
            for buffer in part.buffers():
                buffer.data = buffer.data.to(device, torch.float32 if buffer.is_floating_point() else buffer.dtype)

    def _store(self, device: torch.device, rounded: torch.dtype, master: torch.dtype) -> None:
        """What trains, or would, lies on `device`: in the dtype `rounded` what autocast rounds, else in `master`."""
        for name, parameter in self.transformer.named_parameters():
            if parameter.requires_grad:
                dtype = rounded if is_rounded(self.transformer, name) else master
                # without masters always a copy: a file's memory is never written into
                parameter.data = parameter.data.to(device, dtype, copy=rounded != master)

    def _divide(self, mesh: "DeviceMesh", device: torch.device, compute: torch.dtype, master: torch.dtype) -> None:
        from flowgrove.models.sharding import ShardedTransformer

        def stored(parameter: nn.Parameter) -> torch.dtype:
            return master if parameter.requires_grad else parameter.dtype

        self.sharded.append(ShardedTransformer(self.transformer, mesh, device, compute, stored))
        if self.reference_copy is not None:
            self.sharded.append(ShardedTransformer(self.reference_copy, mesh, device, compute, lambda _: compute))

    def _frozen_copy(self, compute: torch.dtype, device: torch.device, divided: bool) -> Any:
        """The transformer as it is now. One that will be divided takes no memory of its own before it is; another one's
        weights are on `device` in `compute`, and nowhere twice in the dtype that they came in.
        """
        alike = {id(p): nn.Parameter(p.data, requires_grad=False) for p in self.transformer.parameters()}
        if divided:
            return copy.deepcopy(self.transformer, memo=dict(alike))
        trained = trained_parts(self.transformer).values()
        still = {id(one): one for one in parts_of(self.transformer) if all(one is not part for part in trained)}
        whole = copy.deepcopy(self.transformer, memo=alike | still).requires_grad_(False)  # a frozen expert serves both
        for part in trained_parts(whole).values():  # and no buffers, which autocast rounds in neither model
            for parameter in part.parameters():
                parameter.data = parameter.data.to(device, compute, copy=True)
        return whole

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name → master weight, or this rank's rows of it (see `pieces`), in the transformer's order; of a model that
        only draws, the weight that passes read. An optimiser that has changed them calls `refresh`.
        """
        masters = {**(self._masters.of if self._masters is not None else {}), **self._divided}
        return {name: masters.get(name, p) for name, p in self.transformer.named_parameters() if p.requires_grad}

    @property
    def _divided(self) -> dict[str, nn.Parameter]:
        return self.sharded[0].masters if self.sharded else {}

    def cheapen(self, precision: Precision | None, compiled: bool | str = False, attention: str | None = None) -> None:
        """Keeps the transformer a second time for passes that nothing differentiates, with linear layers in this
        precision and this attention, as `check_attention` has let it; None of both: no more. Raises UserError.
        """
        self._cheap = None  # first, for its memory
        gc.collect()  # a transformer with a forward of its own refers to itself
        if precision is not None:
            self._cheap = QuantisedCopy(self.transformer, precision, self._compute, compiled, attention)
        elif attention is not None:
            self._cheap = Twin(with_attention(self.transformer, attention), compiled)

    @property
    def cheap(self) -> Twin:
        """That copy, of the weights as they are now. Raises ValueError where there is none."""
        if self._cheap is None:
            raise ValueError("there is no cheap copy of these weights: call cheapen")
        self._cheap.follow()
        return self._cheap

    @contextmanager
    def gathered(self, reference: bool = False) -> Iterator[None]:
        """Inside the block, which all ranks enter, passes wait for no other rank; with `reference` the reference
        model's neither. Weights may stay gathered after it, until they change.
        """
        divided = self.sharded[: 2 if reference else 1]
        with self._ranks.meeting():
            for one in divided:
                with span("gather_weights", COMMUNICATION):
                    one.gather()
        try:
            yield
        finally:
            for one in divided[0 if self.reshards else 1 :]:
                one.free()

    def reshard(self, reshards: bool) -> None:
        """Whether training passes free what they have gathered."""
        self.reshards = reshards

    def meet(self) -> None:
        """From here on all ranks run their passes together."""
        for one in self.sharded:
            one.keep(not self.reshards)

    def reduce_copies(self, last: bool) -> None:
        """Says whether the backward to come is the last one before gradients are taken."""
        if self.sharded:
            self.sharded[0].reduce_copies(last)

    def take_gradients(self) -> None:
        """What backwards have left becomes the masters' gradients, wherever it lies."""
        if self.sharded:
            self.sharded[0].take_gradients()

    def own_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of what lies on this rank, as parts of a sum: over all ranks every element comes as often as
        ranks have a share in it. Rows of a divided weight have a name of their own, and come from one copy.
        """
        pieces, mine = self.pieces, not self.sharded or self.sharded[0].of_first_copy
        for name, parameter in self.trainable().items():
            if parameter.grad is None or (name in pieces and not mine):
                continue
            yield (f"{name}/{pieces[name].start}" if name in pieces else name), parameter.grad

    def drop_gradients(self) -> None:
        """Drops the gradients of masters, and of copies where a backward has failed on its way."""
        self.transformer.zero_grad(set_to_none=True)
        for master in self._masters.of.values() if self._masters is not None else ():
            master.grad = None
        if self.sharded:
            self.sharded[0].drop_gradients()

    def refresh(self) -> None:
        """The weights that passes read follow the masters."""
        if self._masters is not None:
            self._masters.refresh()
        if self.sharded:
            self.sharded[0].free()
        if self._cheap is not None:
            self._cheap.changed()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The masters take the values of `tensors`, one for each of their names and shapes. Where there are none, the
        values are rounded on the way, as `refresh` rounds them.
        """
        for name, parameter in self.trainable().items():
            parameter.copy_(tensors[name])
        self.refresh()

    @torch.no_grad()
    def exchange(self, tensors: dict[str, Tensor]) -> None:
        """The masters and `tensors` of the same names change places: storage changes hands, nothing is copied. Only
        rows of divided weights are: FSDP knows them by their storage.
        """
        divided = self._divided
        for name, parameter in self.trainable().items():
            if name in divided:
                kept = parameter.clone()
                parameter.copy_(tensors[name])
                tensors[name].copy_(kept)
            else:
                parameter.data, tensors[name] = tensors[name], parameter.data
        self.refresh()

    def _adapted(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The LoRA weights that passes read, by name."""
        return ((name, p) for name, p in self.transformer.named_parameters() if p.requires_grad)

    def _exchange_adapted(self) -> None:
        """What the layers started from and what passes read change places: storage changes hands."""
        for name, parameter in self._adapted():
            parameter.data, self.initial[name] = self.initial[name], parameter.data

    @property
    def identity(self) -> int:
        """Names the storage that the masters lie in, which is another one once they have been exchanged."""
        return self._first.data_ptr()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside the block the reference model can run: `reference_copy`, or the transformer, whose LoRA is off or, of
        one that started from another, as it started.
        """
        if self.reference_copy is not None:
            yield
            return
        if self.initial:
            self._exchange_adapted()
            try:
                yield
            finally:
                self._exchange_adapted()
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()
