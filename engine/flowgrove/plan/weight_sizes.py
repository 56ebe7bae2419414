"""How many of a transformer's weights a rank holds, gathers, and adds up with others."""

from dataclasses import dataclass

from torch import nn

from flowgrove.models.blocks import blocks_of
from flowgrove.models.masters import ROUNDED


@dataclass(frozen=True)
class WeightSizes:
    """Numbers of weights, by what happens to them. Divided among `shards` ranks are those of linear and convolution
    layers: all that train, or with LoRA the frozen ones. Rows of the first dimension are divided, rounded up, so that a
    weight takes ⌈rows / shards⌉ rows on a rank and `shards` times that where it is gathered.

    `divided`: names; `trained`: on one rank, with its rows of the divided ones, which `trained_rows` counts alone;
    `frozen_rows`: its rows of those that do not train; `gathered`, and of these `gathered_trained`: the divided weights
    of all ranks; `at_once`: what is gathered at most where blocks are gathered one by one, namely those outside blocks
    and two blocks, of which one comes early; `largest_block`: the most that one block holds.
    """

    divided: frozenset[str]
    trained: int
    trained_rows: int
    frozen_rows: int
    gathered: int
    gathered_trained: int
    at_once: int
    largest_block: int

    @classmethod
    def of(cls, transformer: nn.Module, shards: int | None, lora: bool) -> "WeightSizes":
        """Those of a transformer whose trained weights are chosen. `shards`: None: nothing is divided."""
        weights = dict(transformer.named_parameters())
        rows: dict[str, int] = {}
        for name, weight in weights.items():
            layer = transformer.get_submodule(name.rpartition(".")[0])
            if shards is not None and isinstance(layer, ROUNDED) and not (lora and weight.requires_grad):
                rows[name] = -(-weight.shape[0] // shards) * weight[0].numel()
        names = {id(weight): name for name, weight in weights.items()}
        blocks = sorted(
            (shards or 1) * sum(rows.get(names[id(weight)], 0) for weight in block.parameters())
            for block in blocks_of(transformer)
        )
        gathered = (shards or 1) * sum(rows.values())
        trained_rows = sum(count for name, count in rows.items() if weights[name].requires_grad)
        whole = sum(weight.numel() for name, weight in weights.items() if weight.requires_grad and name not in rows)
        return cls(
            divided=frozenset(rows),
            trained=whole + trained_rows,
            trained_rows=trained_rows,
            frozen_rows=sum(rows.values()) - trained_rows,
            gathered=gathered,
            gathered_trained=(shards or 1) * trained_rows,
            at_once=gathered - sum(blocks[:-2]),
            largest_block=max(blocks, default=0),
        )

    @property
    def trained_whole(self) -> int:
        """Trained weights that every rank holds whole."""
        return self.trained - self.trained_rows
