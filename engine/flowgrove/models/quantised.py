"""Transformers whose linear layers compute in 8 bits, for passes that are not differentiated and whose log-probability
nobody takes (rollout.precision).

A weight is rounded once per output channel, by torchao, and an activation anew in every pass, per token:

    y = s_x · s_w · (x̂ ŵᵀ) + b        x̂ = round(x / s_x), s_x = max |x| / most    (most: 127, or 448 of float8 e4m3)

The products are torch's own for both formats. Sums are int32 for int8. Those of fp8 are fp32 on a CPU; on a GPU they
stay in the tensor cores' accumulators (fast accumulation), which on Hopper keep fewer bits than fp32. There the
rounding of activations is one compiled kernel. What is rounded are the linear layers that run per token in the blocks.
Layers outside the blocks (embeddings, the last projection) and modulations, which run once per sample, are little work,
and their rounding would shift and scale every token alike; they, norms and LoRA layers run as they are.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowgrove.errors import UserError
from flowgrove.models.attention import with_attention
from flowgrove.models.blocks import blocks_of
from flowgrove.models.compiling import settle_compiler
from flowgrove.models.twins import Twin, twin

Precision = Literal["fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp8", "int8")
MULTIPLES = {"fp8": 16, "int8": 8}  # of which both sides of a weight must be one for the kernels
FP8_FROM = (8, 9)  # compute capability
_MOST = {"fp8": 448.0, "int8": 127.0}
_LEAST_SCALE = torch.finfo(torch.float32).eps  # of a row of zeros
_LEAST_ROWS = 17  # of torch._int_mm on a GPU
_LARGEST = torch.full((8, 64), 127, dtype=torch.int8, device="cpu")
# Whether this CPU's product of bytes is right: some kernels add products up in 16 bits, which overflow, and what a CPU
# says of its instructions does not tell which one runs.
ADDS_EXACTLY = bool((torch._int_mm(_LARGEST, _LARGEST.t()) == 64 * 127**2).all())
_NOT_PER_TOKEN = re.compile(r"(^|\.)(norm\w*|\w+_mod|\w*modulation\w*)(\.|$)")
_LORA = re.compile(r"(^|\.)lora_")


def quantisable(transformer: nn.Module, precision: Precision) -> dict[str, nn.Linear]:
    """The layers that are rounded, by name: linear ones of the blocks that run per token, unless a folder holds their
    weights quantised already.
    """
    own = {id(module) for block in blocks_of(transformer) for module in block.modules()}
    multiple = MULTIPLES[precision]
    return {
        name: module
        for name, module in transformer.named_modules()
        if id(module) in own
        and type(module) is nn.Linear
        and not is_traceable_wrapper_subclass(module.weight)
        and not _NOT_PER_TOKEN.search(name)
        and not _LORA.search(name)
        and module.in_features % multiple == 0
        and module.out_features % multiple == 0
    }


class QuantisedCopy(Twin):
    """A second tree of a transformer's modules, which shares all of it but the layers that are rounded.

    `transformer`: that tree; `attention`: of its passes, None: the transformer's. Where the weights train, `outdated`
    says that they have changed since they were rounded.
    Raises UserError for a device or installation that cannot, and for a transformer without such layers.
    """

    def __init__(
        self,
        transformer: Any,
        precision: Precision,
        compute: torch.dtype,
        compiled: bool | str = False,
        attention: str | None = None,
    ) -> None:
        layers = quantisable(transformer, precision)
        if not layers:
            why = f"no plain linear layer of the transformer's blocks has multiples of {MULTIPLES[precision]} as sizes"
            raise UserError(f"rollout.precision is {precision}: {why}; write null")
        check_precision(precision, next(iter(layers.values())).weight.device)
        self.precision = precision
        self.layers = {
            name: QuantisedLinear(layer, precision, compute, *quantised_weight(layer.weight, precision))
            for name, layer in layers.items()
        }
        rounded = twin(transformer, {layer: self.layers[name] for name, layer in layers.items()})
        super().__init__(rounded if attention is None else with_attention(rounded, attention), compiled)
        self._trained = [self.layers[name] for name, layer in layers.items() if layer.weight.requires_grad]
        self.outdated = False

    def changed(self) -> None:
        """The transformer's weights have changed."""
        self.outdated = bool(self._trained)

    def follow(self) -> None:
        """The rounded weights follow the transformer's, in place, so that recorded passes read them."""
        if self.outdated:
            for layer in self._trained:
                layer.follow()
        self.outdated = False


class QuantisedLinear(nn.Module):
    """A linear layer in 8 bits. `codes` [out, in], `scale` fp32 [out] of its weight; the bias is the layer's own.

    It returns `compute`, whatever the dtype of its input, as the layer does under autocast.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self, layer: nn.Linear, precision: Precision, compute: torch.dtype, codes: Tensor, scale: Tensor
    ) -> None:
        super().__init__()
        self.precision, self.compute = precision, compute
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self._layer = (layer,)  # in a tuple: no part of this one
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @torch.no_grad()
    def follow(self) -> None:
        """Rounds the layer's weight anew."""
        codes, scale = quantised_weight(self._layer[0].weight, self.precision)
        self.codes.copy_(codes)
        self.scale.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        fused = x.is_cuda and not torch.compiler.is_compiling()
        product = _compiled(self.precision) if fused else _PRODUCTS[self.precision]
        y: Tensor = product(x.flatten(0, -2), self.codes, self.scale, self.bias, self.compute)
        return y.view(*x.shape[:-1], self.out_features)


def unloaded_copy(transformer: nn.Module, precision: Precision, compute: torch.dtype) -> nn.Module:
    """The second tree of a transformer whose tensors have no storage."""
    dtype = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    instead = {
        layer: QuantisedLinear(
            layer, precision, compute, torch.empty(layer.weight.shape, dtype=dtype), torch.empty(layer.out_features)
        )
        for layer in quantisable(transformer, precision).values()
    }
    return twin(transformer, instead)


def copy_bytes(transformer: nn.Module, precision: Precision) -> int:
    """Bytes of rounded weights and their scales."""
    layers = quantisable(transformer, precision).values()
    return sum(layer.weight.numel() + torch.float32.itemsize * layer.out_features for layer in layers)


def check_precision(precision: Precision, device: torch.device) -> None:
    """Raises UserError where a format cannot be computed, or torchao is missing."""
    if precision == "fp8" and not has_fp8(device):
        if device.type != "cuda":
            raise UserError(f"rollout.precision is fp8, but the run is on a {device.type}: write int8, or null")
        name = torch.cuda.get_device_name(device)
        raise UserError(f"rollout.precision is fp8, which {name} cannot compute: write int8, or null")
    _rounding(precision)


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies float8 numbers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM


@torch.no_grad()
def quantised_weight(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """(codes [out, in], scale fp32 [out]) of a weight [out, in], as torchao rounds it."""
    # torchao rounds bf16 alone to float8 per row
    values = weight.detach().to(torch.bfloat16) if precision == "fp8" else weight.detach()
    return rounded_by(*_rounding(precision), values)


@torch.no_grad()
def rounded_by(quantize: Callable[..., None], config: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [out, in], scale fp32 [out]) of a weight [out, in], as torchao rounds it with a configuration."""
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize(holder, config)
    rounded: Any = holder.weight
    return rounded.qdata.contiguous(), rounded.scale.reshape(-1).float()


def torchao_rounding(precision: str, key: str) -> tuple[Callable[..., None], Any]:
    """torchao's `quantize_`, and its configuration for weights alone. Raises UserError naming `key` without torchao."""
    torchao = _torchao(precision, key)
    kinds = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}
    return torchao.quantize_, kinds[precision](set_inductor_config=False, version=2)


def _torchao(precision: str, key: str) -> Any:
    try:
        return import_module("torchao.quantization")
    except ImportError:
        raise UserError(f"{key} is {precision}, which needs torchao: pip install torchao, or write null") from None


@cache
def _rounding(precision: Precision) -> tuple[Callable[..., None], Any]:
    """torchao's `quantize_`, and its configuration for weights and activations."""
    torchao = _torchao(precision, "rollout.precision")
    # its inductor settings would hold for the whole process, and allow TF32
    settings = {"granularity": torchao.PerRow(), "set_inductor_config": False, "version": 2}
    if precision == "fp8":
        return torchao.quantize_, torchao.Float8DynamicActivationFloat8WeightConfig(**settings)
    return torchao.quantize_, torchao.Int8DynamicActivationInt8WeightConfig(**settings)


def _fp8_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[M, in] → [M, out]. The kernel gives bf16 and adds a bias of bf16."""
    of_row = _row_scales(x, "fp8")
    rounded = (x.float() / of_row).to(torch.float8_e4m3fn)
    bias = None if bias is None else bias.to(torch.bfloat16)
    y = torch._scaled_mm(
        rounded, codes.t(), of_row, scale.view(1, -1), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda
    )
    return y.to(dtype)


def _int8_product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[M, in] → [M, out]."""
    of_row = _row_scales(x, "int8")
    rounded = (x.float() / of_row).round().to(torch.int8)
    y = _integer_product(rounded, codes) * of_row * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def _integer_product(x: Tensor, codes: Tensor) -> Tensor:
    """x̂ ŵᵀ in fp32, of int8 [M, in] and [out, in]."""
    if x.is_cuda:
        few = _LEAST_ROWS - x.shape[0]
        if few > 0:
            return torch._int_mm(nn.functional.pad(x, (0, 0, 0, few)), codes.t())[: x.shape[0]].float()
    elif not ADDS_EXACTLY:
        return x.float() @ codes.float().t()
    return torch._int_mm(x, codes.t()).float()


def _row_scales(x: Tensor, precision: Precision) -> Tensor:
    """fp32 [M, 1]."""
    return (x.abs().amax(-1, keepdim=True).float() / _MOST[precision]).clamp(min=_LEAST_SCALE)


_PRODUCTS = {"fp8": _fp8_product, "int8": _int8_product}


@cache
def _compiled(precision: Precision) -> Callable[..., Tensor]:
    settle_compiler()
    return cast(Callable[..., Tensor], torch.compile(_PRODUCTS[precision], dynamic=True))
