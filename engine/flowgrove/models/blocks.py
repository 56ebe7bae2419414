"""The blocks of a transformer: what is compiled, or gathered from other ranks, as one."""

from torch import nn

from flowgrove.models.experts import parts_of


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """The members of its lists of blocks, in order."""
    children = [child for part in parts_of(transformer) for child in part.children()]
    return [block for child in children if isinstance(child, nn.ModuleList) for block in child]
