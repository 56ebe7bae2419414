"""torch.compile of a transformer, block by block:
the blocks share their code, so one of each kind is compiled and all run faster.
"""

from torch import nn

from flowgrove.models.blocks import blocks_of


def compile_blocks(transformer: nn.Module) -> int:
    """Compiles every block of the transformer's lists of blocks, for any number of rows; returns how many.
    They compile when they first run.
    """
    blocks = blocks_of(transformer)
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
