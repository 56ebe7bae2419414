"""Numbers that autocast leaves in fp32, rounded once where several layers would each round them for themselves.

On a GPU autocast computes norms in fp32. What an adaptive norm gives then goes on in fp32 into the linear layers of
attention and feed-forward, each of which casts all of it, and attention gives back the dtype of its queries, which a
norm has made. Whoever reads these numbers is a linear layer, so that the forward has the same bits, but of layers in 8
bits, which round what they get themselves; in the backward the gradients of those layers add up in the dtype of
autocast.
"""

from typing import Any

import torch
from torch import Tensor, nn

# of diffusers: adaptive norms whose output several layers read
_NORMS = (
    "AdaLayerNormZero", "AdaLayerNormZeroSingle", "SD35AdaLayerNormZeroX", "ChromaAdaLayerNormZeroPruned",
    "ChromaAdaLayerNormZeroSinglePruned",
)  # fmt: skip
_STATES = ("hidden_states", "encoder_hidden_states")  # attention's first two inputs


def narrow_states(transformer: nn.Module) -> None:
    """Makes adaptive norms and attention of a diffusers transformer give, and attention take, what autocast would make
    of it. Outside autocast nothing changes.
    """
    for module in transformer.modules():
        if type(module).__name__ in _NORMS:
            module.register_forward_hook(_narrow_outputs)
        elif hasattr(module, "get_processor") and not getattr(module, "residual_connection", False):
            module.register_forward_pre_hook(_narrow_inputs, with_kwargs=True)
            module.register_forward_hook(_narrow_outputs)


def _narrow_inputs(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    count = len(_STATES)
    args = (*map(_narrow, args[:count]), *args[count:])
    return args, {name: _narrow(value) if name in _STATES else value for name, value in kwargs.items()}


def _narrow_outputs(_: nn.Module, __: Any, outputs: Any) -> Any:
    return tuple(map(_narrow, outputs)) if isinstance(outputs, tuple) else _narrow(outputs)


def _narrow(x: Any) -> Any:
    """States [B, tokens, channels] in the dtype of autocast; whatever else as it is."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.ndim != 3:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
