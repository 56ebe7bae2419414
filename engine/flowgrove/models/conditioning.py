"""What the transformer is told besides state and time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Conditioning:
    """Tensors whose first dimension is the prompt. Prompts of different lengths (dimension 1) are padded with zeros, which a "…_mask" tells apart."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> "Conditioning":
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """All rows of `parts`, in order, as long as the longest."""
        return Conditioning({name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def split(self) -> list["Conditioning"]:
        """One Conditioning [1, ...] per prompt, without padding."""
        masks = [tensor for name, tensor in self.tensors.items() if name.endswith("_mask")]
        if not masks:
            return [self[i : i + 1] for i in range(len(self))]
        whole = masks[0].shape[1]
        padded = {name for name, tensor in self.tensors.items() if tensor.ndim > 1 and tensor.shape[1] == whole}
        lengths = masks[0].sum(1).tolist()
        return [
            Conditioning({name: tensor[i : i + 1, :n] if name in padded else tensor[i : i + 1] for name, tensor in self.tensors.items()})
            for i, n in enumerate(lengths)
        ]


def _cat(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim < 2:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1])) if tensor.shape[1] < longest else tensor for tensor in tensors])
