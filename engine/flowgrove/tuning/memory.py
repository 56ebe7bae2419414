"""How much memory a run needs, before it runs: the model's own code on tensors without storage, with every allocation
counted.

Nothing is loaded: configuration files give the shapes, PyTorch's FakeTensorMode runs forward and backward, and a
dispatch mode adds up what is alive.
"""

import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.folders import configuration_folder
from flowgrove.models.geometry import read_geometry
from flowgrove.models.loading import ADAPTERS
from flowgrove.models.masters import Masters
from flowgrove.models.parts import is_of_a_library, part_class
from flowgrove.models.policy import COMPUTE_DTYPES, tokens_per_pass
from flowgrove.models.trainable import choose_trainable
from flowgrove.passes.packing import pack
from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Recipe
from flowgrove.rewards.scoring import PIXELS_AT_ONCE

_OPTIMIZER_BYTES = {"adamw": 8, "apex_fused_adam": 8, "adamw_8bit": 2}  # per trained weight


@dataclass(frozen=True)
class Memory:
    """Bytes. `resident`: what stays all the time; `stages`: what each stage needs beside it; `graph`: what a state of
    the rollout holds until the first update if its graph is retained; `rows`: rows of the largest training pass.
    """

    resident: dict[str, int]
    stages: dict[str, int]
    graph: int
    rows: int

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + max(self.stages.values())

    @property
    def loaded(self) -> int:
        """What lies on the device when the model is loaded."""
        return sum(self.resident[name] for name in ("transformer", "master weights", "VAE", "untouched copy"))


def predict_memory(recipe: Recipe, plan: RolloutPlan, device_type: str) -> Memory:
    """Peak memory of an iteration on one device. Text encoders are taken to be freed.
    Raises UserError without configuration files.
    """
    folder = configuration_folder(recipe.model)
    geometry = max((read_geometry(folder, sized.model) for sized in recipe.at_sizes()), key=lambda size: size.tokens)
    compute = COMPUTE_DTYPES[recipe.model.dtype]
    master = torch.float64 if compute == torch.float64 else torch.float32
    family = ADAPTERS[recipe.model.adapter]
    with torch.device("meta"):
        transformer = _from_config(folder, "transformer")
        choose_trainable(transformer, recipe.model.lora, family.lora_targets, 0)
        vae = _from_config(folder, "vae")
    if recipe.model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    budget = tokens_per_pass(recipe, device_type)
    like_cuda = device_type == "cuda" and compute == torch.bfloat16
    prompts, width = recipe.data.prompts_per_iteration, max(step.nodes_out for step in plan.steps)
    latent = geometry.latent_shape
    with _errors_of(folder), FakeTensorMode():
        _materialise(transformer, compute, master)
        masters = (
            sum(p.numel() * p.element_size() for p in Masters(transformer, compute).of.values())
            if compute == torch.bfloat16
            else 0
        )
        weights = sum(
            tensor.numel() * tensor.element_size() for tensor in (*transformer.parameters(), *transformer.buffers())
        )
        decoder = _materialise(vae.requires_grad_(False), family.vae_dtype or compute, master)
        adapter = family(geometry, transformer, SimpleNamespace(vae=vae))
        doubled = 2 if adapter.needs_uncond(recipe.model.guidance_scale) else 1
        rolled, trained_states = _largest_passes(recipe, plan, budget, geometry.tokens * doubled)
        cond = adapter.blank(prompts, compute)
        counted = {
            "training": _peak(lambda: _train(adapter, trained_states * doubled, latent, master, compute), like_cuda),
            "rollout": _peak(lambda: _roll(adapter, rolled * doubled, latent, master, compute), like_cuda),
            "decoding": _peak(
                lambda: adapter.decode(
                    torch.empty(
                        min(adapter.samples_per_decode(device_type), prompts * plan.leaves), *latent, dtype=master
                    )
                )
            ),
        }
        graph = graph_bytes(lambda states: _velocity(adapter, states * doubled, latent, master, compute), like_cuda)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    copies = recipe.model.lora is None and (recipe.update.kl_weight > 0 or recipe.run.eval.tuned_share < 1)
    elements = torch.Size(latent).numel() * master.itemsize
    levels = {end for step in plan.trained_steps for end in (step.index, step.index + 1)}
    kept = sum(plan.steps[level].nodes_in if level < len(plan.steps) else plan.leaves for level in levels)
    pictures = min(prompts * plan.leaves, max(1, PIXELS_AT_ONCE // geometry.pixels)) * geometry.pixels * 3
    # what is scored together, and what scoring it takes beside it
    counted["decoding"] += 2 * pictures * torch.float32.itemsize
    resident = {
        "transformer": weights,
        "master weights": masters,
        "VAE": decoder,
        "untouched copy": sum(p.numel() for p in transformer.parameters()) * compute.itemsize if copies else 0,
        "gradients": trained * master.itemsize,
        "optimiser": trained * _OPTIMIZER_BYTES[recipe.update.optimizer],
        "averaged weights": trained * master.itemsize if recipe.update.ema_decay else 0,
        "forest": prompts * kept * elements,
        "prompts": sum(tensor.untyped_storage().nbytes() for tensor in cond.tensors.values()),
    }
    counted["rollout"] += 4 * prompts * width * elements  # x, v, x' and a history of the widest level
    if recipe.engine.cuda_graphs:  # recordings hold their memory for good
        resident["CUDA graphs"] = counted["rollout"]
    if device_type == "cuda":  # there pictures are decoded and scored beside the next rollout
        counted["rollout with decoding"] = counted.pop("rollout") + counted.pop("decoding")
    return Memory(resident, counted, graph, trained_states * doubled)


def _largest_passes(recipe: Recipe, plan: RolloutPlan, budget: int, tokens: int) -> tuple[int, int]:
    """States of the largest pass in the rollout and in training; `tokens`: what a state costs."""
    share, prompts, counts = recipe.engine.share, recipe.data.prompts_per_iteration, plan.counts

    def largest(states: int) -> int:
        return max((len(rows) for rows in pack(np.full(states, tokens), budget)), default=1)

    trained = counts.train_passes if share else counts.unshared_train_passes
    levels = [step.nodes_in if share else plan.leaves for step in plan.steps]
    return max(largest(prompts * nodes) for nodes in levels), largest(-(-prompts * trained // plan.updates))


def _train(adapter: Adapter, rows: int, latent: tuple[int, ...], master: torch.dtype, compute: torch.dtype) -> None:
    """A training pass. Gradients stay: they are counted as resident, so the caller's peak leaves them out."""
    v = _velocity(adapter, rows, latent, master, compute)
    v.backward(torch.empty_like(v))


@torch.no_grad()
def _roll(adapter: Adapter, rows: int, latent: tuple[int, ...], master: torch.dtype, compute: torch.dtype) -> Tensor:
    return _velocity(adapter, rows, latent, master, compute)


def _velocity(
    adapter: Adapter, rows: int, latent: tuple[int, ...], master: torch.dtype, compute: torch.dtype
) -> Tensor:
    cond = adapter.blank(1, compute)
    expanded = Conditioning(
        {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in cond.tensors.items()}
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        return adapter.velocity(torch.empty(rows, *latent, dtype=master), torch.empty(rows), expanded, 1.0)


@contextmanager
def _norms_in_fp32() -> Iterator[None]:
    """Autocast computes norms in fp32 on a GPU, but not on the CPU, whose rules the tensors without storage follow.

    The functions themselves are exchanged: a mode would be off where checkpoints recompute.
    """
    kept = {name: getattr(functional, name) for name in ("layer_norm", "group_norm", "rms_norm")}

    def in_fp32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return norm(*args, **kwargs)

        return run

    try:
        for name, norm in kept.items():
            setattr(functional, name, in_fp32(norm))
        yield
    finally:
        for name, norm in kept.items():
            setattr(functional, name, norm)


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """What the model's code raises inside the block is a UserError: it does not run with its configuration."""
    try:
        yield
    except BaseException as error:
        if not is_of_a_library(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        what = f"the model in {folder} does not run as its configuration files describe it ({reason})"
        raise UserError(f"{what}: download the folder anew") from error


def _from_config(folder: Path, part: str) -> Any:
    """An untrained model of a part's class and configuration. Raises UserError."""
    kind, file = part_class(folder, part), folder / part / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if config.get("_class_name", kind.__name__) != kind.__name__:
            raise ValueError(f"it is that of a {config['_class_name']}")
        return kind.from_config(config)
    except Exception as error:  # what libraries raise over foreign settings has many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{file} describes no {kind.__name__} ({reason}): download the folder anew") from None


def _materialise(module: nn.Module, frozen: torch.dtype, trained: torch.dtype) -> int:
    """Gives a module on the meta device tensors of the mode that is on; returns their bytes."""
    total = 0
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                dtype = trained if parameter.requires_grad else frozen
                part._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad
                )
                total += parameter.numel() * dtype.itemsize
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
                total += buffer.numel() * buffer.dtype.itemsize
        for name, constant in vars(part).items():
            if isinstance(constant, Tensor):
                setattr(part, name, torch.empty(constant.shape, dtype=constant.dtype))
    return total


def _peak(run: Callable[[], object], like_cuda: bool = False) -> int:
    """Most bytes alive at once while `run` runs,
    of storages that it makes itself and that are gone when it has ended.
    """
    with _Alive() as alive, _norms_in_fp32() if like_cuda else nullcontext():
        run()
    return alive.most - alive.bytes


def graph_bytes(velocity: Callable[[int], object], like_cuda: bool = False) -> int:
    """What a row more holds as long as the differentiable velocity of a pass lives;
    `velocity` takes the pass's rows.
    """
    held = []
    for rows in (1, 2):
        with _Alive() as alive, _norms_in_fp32() if like_cuda else nullcontext():
            result = velocity(rows)
            held.append(alive.bytes)
            del result
    return held[1] - held[0]


class _Alive(TorchDispatchMode):
    """Adds up the storages of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.bytes += size
        self.most = max(self.most, self.bytes)

        def gone(_: object) -> None:
            if self._known.pop(key, None) is not None:
                self.bytes -= size

        self._known[key] = weakref.ref(storage, gone)
