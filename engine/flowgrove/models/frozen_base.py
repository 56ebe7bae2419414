"""Frozen weights in few bits under LoRA layers that train (model.base_precision).

    y = x Ŵᵀ + b        ∂L/∂x = ∂L/∂y Ŵ        Ŵ: the weight as its codes give it

int8 and fp8 (e4m3) have a code for each weight and a scale for each output channel, rounded by torchao; products are of
the codes themselves, in the dtype of passes, and the scale comes after them. nf4 has 4 bits for each weight and a scale
for every 64, rounded to 8 bits themselves (QLoRA, 2305.14314), by bitsandbytes; Ŵ is made anew in each pass and let go.
Nothing of a pass is kept for its backward but its codes, which are there anyway.

What is rounded are all linear layers of the blocks, modulations too, which hold a third of some models. Embeddings and
the last projection are little and stay as they are.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowgrove.errors import UserError
from flowgrove.models.blocks import blocks_of
from flowgrove.models.quantised import rounded_by, torchao_rounding

BasePrecision = Literal["int8", "fp8", "nf4"]
_BLOCK, _SCALES_IN_BLOCK = 64, 256  # weights that have a scale, and scales that have one, of nf4
_KEY = "model.base_precision"
Widen = Callable[..., Tensor]  # (codes, shape, dtype, *scales) → [out, in]


class Rounded(NamedTuple):
    """A weight [out, in]: `codes`, `scale` fp32 [out] that comes after products, and what `widen` needs besides."""

    codes: Tensor
    scale: Tensor | None
    parts: tuple[Tensor, ...]
    widen: Widen


def compressible(transformer: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are rounded, by name: linear ones of the blocks, unless a folder holds them quantised already."""
    own = {id(module) for block in blocks_of(transformer) for module in block.modules()}
    return {
        name: module
        for name, module in transformer.named_modules()
        if id(module) in own and type(module) is nn.Linear and not is_traceable_wrapper_subclass(module.weight)
    }


def compress(transformer: Any, precision: BasePrecision, compute: torch.dtype, device: torch.device) -> None:
    """Rounds a frozen transformer, which comes in host memory, layer by layer on `device`, where all of it is then.
    Raises UserError for a transformer without such layers, and where the library is missing.
    """
    layers = compressible(transformer)
    if not layers:
        raise UserError(f"{_KEY} is {precision}: no linear layer of the transformer's blocks is plain: write null")
    rounding = _nf4 if precision == "nf4" else _per_channel(precision)
    for name, layer in layers.items():
        rounded = rounding(layer.weight.detach().to(device))
        _replace(transformer, name, FrozenLinear(layer, rounded, compute))
    transformer.to(device)


def compress_unloaded(transformer: nn.Module, precision: BasePrecision, compute: torch.dtype) -> None:
    """The same of a transformer on the meta device, whose codes have the sizes that they will have."""
    for name, layer in compressible(transformer).items():
        _replace(transformer, name, FrozenLinear(layer, _unloaded(layer.weight, precision), compute))


class FrozenLinear(nn.Linear):
    """A linear layer of codes, which returns `compute`, whatever the dtype of its input, as the layer does under
    autocast. `weight` holds the codes as whole numbers, which no conversion of a module's dtype touches.
    """

    scale: Tensor | None

    def __init__(self, layer: nn.Linear, rounded: Rounded, compute: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = layer.in_features, layer.out_features, compute
        self._widen, self._code_dtype = rounded.widen, rounded.codes.dtype
        codes = rounded.codes if rounded.codes.dtype in (torch.int8, torch.uint8) else rounded.codes.view(torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", rounded.scale, persistent=False)
        self._parts = [f"part_{number}" for number in range(len(rounded.parts))]
        for name, part in zip(self._parts, rounded.parts, strict=True):
            self.register_buffer(name, part, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        shape = (self.out_features, self.in_features)
        parts = [getattr(self, name) for name in self._parts]
        codes = self.weight if self.weight.dtype == self._code_dtype else self.weight.view(self._code_dtype)
        y: Tensor = _Product.apply(x.to(self.compute), self.bias, self.scale, self._widen, shape, codes, *parts)
        return y

    def widened(self) -> Tensor:
        """Ŵ [out, in] in fp32."""
        parts = [getattr(self, name) for name in self._parts]
        codes = self.weight.view(self._code_dtype)
        whole = self._widen(codes, (self.out_features, self.in_features), torch.float32, *parts)
        return whole if self.scale is None else whole * self.scale[:, None]


class _Product(torch.autograd.Function):
    """x Ŵᵀ + b, differentiable in x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, scale: Tensor | None, widen: Widen, shape: tuple[int, int],
        codes: Tensor, *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(scale, codes, *parts)
        ctx.widen, ctx.shape = widen, shape
        weight = widen(codes, shape, x.dtype, *parts)
        if scale is None:
            return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        y = _scaled(functional.linear(x, weight), scale)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (grad,) = grads
        scale, codes, *parts = ctx.saved_tensors
        weight = ctx.widen(codes, ctx.shape, grad.dtype, *parts)
        grad = grad if scale is None else _scaled(grad, scale)
        return (grad @ weight, None, None, None, None, None, *(None for _ in parts))


def _scaled(y: Tensor, scale: Tensor) -> Tensor:
    """y [..., out] · scale [out] in the dtype of y, which stays as it is: selective checkpoints may keep it."""
    return torch.mul(y, scale, out=torch.empty_like(y))


def _replace(transformer: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(transformer.get_submodule(parent), last, layer)


def _as_numbers(codes: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes of int8 and fp8 are exact in every dtype of passes."""
    return codes.to(dtype)


def _per_channel(precision: BasePrecision) -> Callable[[Tensor], Rounded]:
    quantize, config = torchao_rounding(precision, _KEY)

    def rounding(weight: Tensor) -> Rounded:
        return Rounded(*rounded_by(quantize, config, weight), (), _as_numbers)

    return rounding


@cache
def _bitsandbytes() -> Any:
    """bitsandbytes.functional."""
    try:
        return import_module("bitsandbytes.functional")
    except ImportError:
        what = f"{_KEY} is nf4, which needs bitsandbytes: pip install bitsandbytes, or write int8"
        raise UserError(what) from None


def _nf4(weight: Tensor) -> Rounded:
    codes, state = _bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    inner = state.state2
    return Rounded(codes, None, (state.absmax, state.code, state.offset, inner.absmax, inner.code), _widen_nf4)


def _widen_nf4(
    codes: Tensor, shape: tuple[int, int], dtype: torch.dtype, scales: Tensor, numbers: Tensor, offset: Tensor,
    outer_scales: Tensor, outer_numbers: Tensor,
) -> Tensor:  # fmt: skip
    library = _bitsandbytes()
    outer = library.QuantState(absmax=outer_scales, code=outer_numbers, blocksize=_SCALES_IN_BLOCK, dtype=torch.float32)
    state = library.QuantState(
        absmax=scales, shape=torch.Size(shape), code=numbers, blocksize=_BLOCK, quant_type="nf4", dtype=dtype,
        offset=offset, state2=outer,
    )  # fmt: skip
    whole: Tensor = library.dequantize_4bit(codes, state)
    return whole


def _unloaded(weight: Tensor, precision: BasePrecision) -> Rounded:
    """Codes and scales of the sizes that a weight takes."""
    if precision != "nf4":
        dtype = torch.int8 if precision == "int8" else torch.uint8
        codes = torch.empty_like(weight, dtype=dtype)
        return Rounded(codes, torch.empty(weight.shape[0], device=weight.device), (), _as_numbers)
    blocks = -(-weight.numel() // _BLOCK)
    codes = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(blocks, dtype=torch.uint8, device=weight.device)
    outer = torch.empty(-(-blocks // _SCALES_IN_BLOCK), device=weight.device)
    return Rounded(codes, None, (scales, outer), _unloaded_nf4)


def _unloaded_nf4(codes: Tensor, shape: tuple[int, int], dtype: torch.dtype, scales: Tensor, outer: Tensor) -> Tensor:
    """What widening allocates: the scales in fp32, and the weight."""
    wide = scales.to(torch.float32)
    return torch.empty(shape, dtype=dtype, device=wide.device)
