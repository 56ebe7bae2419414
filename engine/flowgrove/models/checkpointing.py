"""What a training pass keeps of each block of the transformer for its backward, which computes the rest again."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flowgrove.models.compiling import compiled
from flowgrove.recipe.schema import Checkpointing

_PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}  # where their factors stand
_NARROW = 8  # times fewer numbers go into an element of a product than it has columns: LoRA's second one


def checkpoint_blocks(transformer: Any, kind: Checkpointing, compile_mode: bool | str = False) -> None:
    """Makes the blocks of a diffusers transformer keep what `kind` says: none, nothing that is computed again; full,
    their inputs alone; selective, also what attention and matrix products give; offload, their inputs in host memory.
    auto, where it is not settled, is full.

    `compile_mode`: as engine.compile. A compiled block hides its operations from a checkpoint around it, so that a
    selective one is compiled with its block: torch then divides forward and backward as the checkpoint says.
    """
    if kind == "none":
        transformer.disable_gradient_checkpointing()
    elif kind == "selective":
        selectively = compiled(_selectively, compile_mode) if compile_mode else _selectively
        transformer.enable_gradient_checkpointing(selectively)
    elif kind == "offload":
        transformer.enable_gradient_checkpointing(_offloading)
    else:
        transformer.enable_gradient_checkpointing()


def _offloading(block: Any, *inputs: Any) -> Any:
    # of what the block computes the checkpoint keeps nothing: these hooks see its inputs alone
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(block.__call__, *inputs, use_reentrant=False)


def _to_host(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """An input that has a gradient, on its way to pinned memory; others stay where they are, as all blocks share them.
    Copies and passes take turns in one stream: none of them waits on the host, nor for another stream.
    """
    if not x.requires_grad:
        return x
    if isinstance(x, FakeTensor):  # a prediction: on no device
        return x.device, torch.empty_like(x, device="meta")
    host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    return x.device, host.copy_(x.detach(), non_blocking=True)


def _to_device(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return torch.empty_like(host, device=device) if host.is_meta else host.to(device, non_blocking=True)


def _selectively(block: Any, *inputs: Any) -> Any:
    # past the block's own compiled code: whoever compiles this compiles the block in it
    return checkpoint(block._call_impl, *inputs, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_keeps)


def _keeps(_: object, op: Any, *inputs: Any, **__: Any) -> CheckpointPolicy:
    """Products over few numbers cost less to compute again than to keep, and so do the batched ones of attention that
    no kernel fuses, whose scores grow with the square of the tokens.
    """
    if op in _PRODUCTS:
        left, right = (inputs[place] for place in _PRODUCTS[op])
        return _policy(left.shape[1] * _NARROW > right.shape[1])
    return _policy(_is_attention(str(op)))


def _is_attention(name: str) -> bool:
    """Whether an op is a kernel of attention, PyTorch's own or another's, and no part of a backward."""
    fused = "scaled_dot_product" in name or "flash_attn" in name or "attention_forward" in name
    return fused and "backward" not in name


def _policy(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
