"""LoRA layers whose second product adds to the base layer's output in one operation:

    y = W x + b + s · B (A x)        s = alpha / rank

peft writes B A x, scales it and adds it, and its backward scales the gradient of y. One product that adds does not
scale, rounds once less, and where nothing is differentiated writes nothing of the output's size besides the output;
else y is copied into the result first.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class FusedLinear(Linear):
    """peft's layer, for one adapter without dropout, bias or variant; whatever else it is asked for is peft's own.
    So is what torch.compile compiles, which joins scaling and adding with the operations that follow.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] → [..., out] in the base layer's dtype."""
        otherwise = args or kwargs or self.disable_adapters or self.merged or len(self.active_adapters) != 1
        if otherwise or torch.compiler.is_compiling():
            return self._as_peft(x, *args, **kwargs)
        (name,) = self.active_adapters
        if name not in self.lora_A:
            return self._as_peft(x)
        y: Tensor = self.base_layer(x)
        first, second = self.lora_A[name], self.lora_B[name].weight
        narrow = first(self._cast_input_dtype(x, first.weight.dtype)).flatten(0, -2)
        wide, scale = y.flatten(0, -2), self.scaling[name]
        if narrow.dtype != wide.dtype:  # of layers in two dtypes without autocast, which no product adds up
            return (wide + narrow @ second.t() * scale).view(y.shape).to(y.dtype)
        alike = wide.dtype == narrow.dtype == second.dtype
        if alike and not torch.is_grad_enabled():
            # in place, for which no checkpoint keeps y
            return wide.addmm_(narrow, second.t(), alpha=scale).view(y.shape)
        return torch.addmm(wide, narrow, second.t(), alpha=scale).view(y.shape).to(y.dtype)

    def _as_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        return y


def fuse_lora(transformer: nn.Module) -> int:
    """Makes a transformer's plain LoRA layers fuse; returns how many. Layers of convolutions, of weights that a library
    has quantised, and those with dropout, a bias or a variant stay as they are.
    """
    layers = [module for module in transformer.modules() if type(module) is Linear and _plain(module)]
    for layer in layers:
        layer.__class__ = FusedLinear  # in place: others hold it, and copies of it are such layers, too
    return len(layers)


def _plain(layer: Any) -> bool:
    dropped = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    biased = any(second.bias is not None for second in layer.lora_B.values())
    return not (dropped or biased or layer.lora_variant or layer.fan_in_fan_out)
