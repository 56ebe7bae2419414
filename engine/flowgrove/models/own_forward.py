"""Forwards of ours in place of diffusers', for transformers whose own asks the host, or lists what can be one batch."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def replace_forward(transformer: Any, forward: Callable[..., Tensor]) -> None:
    """Makes `forward` the transformer's own; None, of an adapter that only encodes, has none."""
    if transformer is not None:
        transformer.forward = MethodType(forward, transformer)


def replace_attention(transformer: Any, theirs: str, ours: Callable[[], Any]) -> None:
    """Gives every block whose attention has diffusers' processor of this name one of ours; None has no blocks."""
    if transformer is not None:
        for block in transformer.transformer_blocks:
            if type(block.attn.processor).__name__ == theirs:
                block.attn.set_processor(ours())


def run_block(transformer: Any, block: Any, *inputs: Any) -> Any:
    """What a block gives, checkpointed where the transformer's blocks are."""
    if torch.is_grad_enabled() and transformer.gradient_checkpointing:
        return transformer._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)
