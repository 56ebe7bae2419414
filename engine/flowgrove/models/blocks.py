"""The blocks of a transformer: what is compiled, or gathered from other ranks, as one."""

from torch import nn


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The members of its lists of blocks, in order."""
    return [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
