"""The optimisers of update.optimizer. All follow the protocol of torch's fused ones: a tensor `found_inf` (1.0: a
gradient is not finite) that is set before `step()` makes it leave weights and state as they are, decided on the device,
without a read by the host.

    adamw             torch.optim.AdamW(fused=True)
    adamw_8bit        torchao's AdamW8bit: both moments as 8-bit codes with a scale per 256 values
                      (2110.02861), 2 instead of 8 bytes per weight
    apex_fused_adam   apex.optimizers.FusedAdam(adam_w_mode=True): one launch for many tensors
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Update

_BUILD_APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install "
    "--no-build-isolation . "
    '(older versions: pip install --no-build-isolation --config-settings "--build-option=--cpp_ext" --config-settings '
    '"--build-option=--cuda_ext" .)'
)


class Settings(TypedDict):
    """What all of them take."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def make_optimizer(update: Update, parameters: Iterable[nn.Parameter], device: torch.device) -> Optimizer:
    """The optimiser of `update` over `parameters`, which lie on `device`.
    Raises UserError for a package or a device that is missing.
    """
    weights = list(parameters)
    settings: Settings = {
        "lr": update.lr, "weight_decay": update.weight_decay, "betas": update.betas, "eps": update.eps,
    }  # fmt: skip
    if update.optimizer == "adamw":
        return torch.optim.AdamW(weights, **settings, fused=True)
    if any(weight.dtype == torch.float64 for weight in weights):
        raise UserError(
            f"update.optimizer is {update.optimizer}, which computes in fp32: with model.dtype: "
            "fp64 write update.optimizer: adamw"
        )
    if update.optimizer == "adamw_8bit":
        return AdamW8bit(weights, settings)
    if device.type != "cuda":
        raise UserError(
            "update.optimizer is apex_fused_adam, which runs on CUDA devices only, "
            f"not on {device.type}{_unrelated()}: write adamw"
        )
    return ApexFusedAdam(weights, settings)


class AdamW8bit(Optimizer):
    """torchao's AdamW8bit with `found_inf`. Tensors of fewer than 4096 values, or of no multiple of 256, keep float32
    moments.

    torchao writes its result in place and knows no skipping: each tensor is kept while it is updated and put back where
    the gradient was bad, one tensor at a time, so that no more than the largest of them is held twice. On a GPU torchao
    compiles its step once per shape; on the CPU it runs uncompiled.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: Settings) -> None:
        try:
            torchao = import_module("torchao.optim")
        except ImportError:
            raise UserError(
                "update.optimizer is adamw_8bit, which needs torchao: pip install torchao, or write adamw"
            ) from None
        super().__init__(parameters, dict(settings))
        self.found_inf = torch.zeros((), device=parameters[0].device)
        # one optimiser per tensor, so that they can be stepped one at a time
        self.parts = [torchao.AdamW8bit([p], **settings) for p in parameters]
        for part, p in zip(self.parts, parameters, strict=True):
            # made here, with the count on the device: torchao would count on the host, where a skipped step cannot be
            # seen
            self.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": part._new_buffer(p, True),
                "exp_avg_sq": part._new_buffer(p, False),
            }
            part.state[p] = self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight with a gradient, or none if `found_inf`."""
        bad = self.found_inf != 0
        group = self.param_groups[0]
        with torch.compiler.set_stance("force_eager") if bad.device.type == "cpu" else nullcontext():
            for part, p in zip(self.parts, group["params"], strict=True):
                if p.grad is None:
                    continue
                tensors = [p, *(tensor for _, tensor in _named_tensors(self.state[p]))]
                kept = [tensor.clone() for tensor in tensors]
                part.param_groups[0]["lr"].fill_(group["lr"])
                part.step()
                for tensor, old in zip(tensors, kept, strict=True):
                    tensor.copy_(torch.where(bad, old, tensor))


class ApexFusedAdam(Optimizer):
    """apex's FusedAdam with `found_inf`: its capturable mode takes the flag from a gradient scaler and leaves weights
    and moments alone on the device.
    """

    def __init__(self, parameters: list[nn.Parameter], settings: Settings) -> None:
        try:
            if is_unrelated_apex():
                raise ImportError
            fused = import_module("apex.optimizers").FusedAdam
            self.inner = fused(parameters, **settings, adam_w_mode=True, capturable=True)
        except (ImportError, RuntimeError):  # RuntimeError: apex without its CUDA extensions
            needs = f"NVIDIA's apex, built from its source with the extensions{_unrelated()}"
            raise UserError(
                f"update.optimizer is apex_fused_adam, which needs {needs}: {_BUILD_APEX}, or write adamw"
            ) from None
        super().__init__(parameters, dict(settings))
        self.found_inf = torch.zeros((), device=parameters[0].device)
        self.steps = torch.zeros((), device=parameters[0].device)  # one count for all
        for p in parameters:
            self.state[p] = {
                "step": self.steps,
                "exp_avg": torch.zeros_like(p, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
            }
            self.inner.state[p] = self.state[p]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every weight with a gradient, or none if `found_inf`."""
        group = self.inner.param_groups[0]
        group["lr"].fill_(self.param_groups[0]["lr"])
        # apex adds 1, unless its flag tells that the step before was skipped
        group["step"] = self.steps.to(torch.int32)[None]
        self.inner._dummy_overflow_buf.zero_()
        self.inner.step(grad_scaler=_Scaler(self.found_inf))
        self.steps += self.found_inf == 0


class _Scaler:
    """What apex asks of torch's gradient scaler: the flag per device, and a scale, here 1."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf[None]}

    def _get_scale_async(self) -> Tensor:
        return torch.ones(1, device=self.found_inf.device)


def state_tensors(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state as plain tensors: NAME/step, NAME/exp_avg, NAME/exp_avg_sq;
    of quantised moments their parts, like NAME/exp_avg/codes.
    """
    return {
        f"{name}/{key}": tensor.clone()
        if tensor.ndim == 0
        else tensor.contiguous()  # a count may be shared, files hold no shared memory
        for name, p in parameters.items()
        if p in optimizer.state
        for key, tensor in _named_tensors(optimizer.state[p])
    }


@torch.no_grad()
def load_state_tensors(optimizer: Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave, bit for bit.
    Raises ValueError if the names, shapes or dtypes are not those of this optimiser's state.
    """
    left = dict(tensors)

    def take(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = left.pop(key, None)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(key)
        return tensor

    for name, p in parameters.items():
        if p in optimizer.state:
            for key, place in _named_tensors(optimizer.state[p]):
                place.copy_(take(f"{name}/{key}", place.shape, place.dtype))
        elif f"{name}/step" in left:  # torch's AdamW has no state before its first step
            moment = (p.shape, p.dtype)
            kinds = {"step": (torch.Size(), torch.float32), "exp_avg": moment, "exp_avg_sq": moment}
            optimizer.state[p] = {key: take(f"{name}/{key}", *kind).to(p.device) for key, kind in kinds.items()}
    if left:
        raise ValueError(next(iter(left)))


def is_unrelated_apex() -> bool:
    """Whether the installed `apex` is the web toolkit of that name on PyPI: NVIDIA's has apex.optimizers.
    Imports neither.
    """
    spec = find_spec("apex")
    return spec is not None and not any(
        (Path(place) / "optimizers").is_dir() for place in spec.submodule_search_locations or ()
    )


def _unrelated() -> str:
    return " (the apex that is installed is the unrelated package of that name on PyPI)" if is_unrelated_apex() else ""


def _named_tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) pairs; a tensor subclass, as torchao's moments are, gives its parts as key/part."""
    for key, value in state.items():
        if hasattr(value, "__tensor_flatten__"):
            for part in value.__tensor_flatten__()[0]:
                yield f"{key}/{part}", getattr(value, part)
        else:
            yield key, value
