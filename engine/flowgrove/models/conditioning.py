"""What the transformer is told besides state and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from flowgrove.device import to_device, to_host


def padded_length(tokens: Any) -> Any:
    """The tokens to which a text (or an array of them) is padded: steps of 16, so that few shapes occur."""
    return -(-tokens // 16) * 16


@dataclass(frozen=True)
class Conditioning:
    """Tensors whose first dimension is the prompt. Prompts of different lengths (dimension 1) are padded with zeros,
    which a "…_mask" tells apart; tensors named "source_…", of pictures or of what prompts quote, have the same
    shape in all.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> "Conditioning":
        return Conditioning({name: tensor[rows] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> "Conditioning":
        """On `device`; the host does not wait for what goes to a GPU."""
        return Conditioning(
            {
                name: to_host(tensor) if device.type == "cpu" else to_device(tensor, device)
                for name, tensor in self.tensors.items()
            }
        )

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors' storage."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """All rows of `parts`, in order, as long as the longest."""
        return Conditioning({name: _cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt's text, on the host; without a mask, of the padded one."""
        mask = self._mask()
        if mask is None:
            return np.full(
                len(self),
                max((tensor.shape[1] for name, tensor in self.tensors.items() if _is_text(name, tensor)), default=0),
                dtype=np.int64,
            )
        return to_host(mask.sum(1)).numpy().astype(np.int64)

    def trimmed(self, longest: int | None) -> "Conditioning":
        """Without the padding behind the `padded_length` of `longest`; without a mask, as it is."""
        mask = self._mask()
        if longest is None or mask is None:
            return self
        end = padded_length(longest)
        return Conditioning(
            {name: tensor[:, :end] if name in self._padded(mask) else tensor for name, tensor in self.tensors.items()}
        )

    def without_padding(self) -> "Conditioning":
        """The same, as long as the longest text."""
        return self.trimmed(int(self.lengths().max()))

    def masked_lengths(self) -> NDArray[np.int64]:
        """Tokens of each row in each sequence that a mask marks, int64 [P, masks] on the host."""
        counts = [self.tensors[name].sum(1, dtype=torch.int64) for name in self._masked()]
        return to_host(torch.stack(counts, dim=1)).numpy() if counts else np.empty((len(self), 0), dtype=np.int64)

    def unmasked(self, lengths: Sequence[int] | None = None) -> "Conditioning":
        """Without masks, of rows whose masked sequences all have these lengths; None: all that the tensors hold."""
        masked, tensors = self._masked(), dict(self.tensors)
        for number, (mask, names) in enumerate(masked.items()):
            for name in names:
                tensors[name] = tensors[name] if lengths is None else tensors[name][:, : int(lengths[number])]
            del tensors[mask]
        return Conditioning(tensors)

    def split(self) -> list["Conditioning"]:
        """One Conditioning [1, ...] per prompt, without padding."""
        mask = self._mask()
        if mask is None:
            return [self[i : i + 1] for i in range(len(self))]
        padded = self._padded(mask)
        return [
            Conditioning(
                {
                    name: tensor[i : i + 1, :n] if name in padded else tensor[i : i + 1]
                    for name, tensor in self.tensors.items()
                }
            )
            for i, n in enumerate(self.lengths())
        ]

    def _mask(self) -> Tensor | None:
        return next((tensor for name, tensor in self.tensors.items() if _is_mask(name)), None)

    def _masked(self) -> dict[str, list[str]]:
        """The masks of sequences, that of the text first, each with the tensors that have its sequence."""
        found: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            if _is_mask(name):
                found = {name: sorted(self._padded(tensor) - {name})} | found
            elif name.endswith("_mask") and (of := name.removesuffix("_mask")) in self.tensors:
                found[name] = [of]
        return found

    def _padded(self, mask: Tensor) -> set[str]:
        """The tensors whose dimension 1 is the text."""
        return {
            name for name, tensor in self.tensors.items() if _is_text(name, tensor) and tensor.shape[1] == mask.shape[1]
        }


def blank_texts(rows: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Zeros [rows, tokens, width] in place of texts that stand under a mask, all tokens marked."""
    embeds = torch.zeros(rows, tokens, width, dtype=dtype)
    return {
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": torch.ones(embeds.shape[:2], dtype=torch.bool),
    }


def _is_text(name: str, tensor: Tensor) -> bool:
    """Whether the dimension 1 is the text."""
    return _is_mask(name) or (tensor.ndim > 2 and not name.startswith("source_"))


def _is_mask(name: str) -> bool:
    return name.endswith("_mask") and not name.startswith("source_")


def _cat(tensors: list[Tensor]) -> Tensor:
    if tensors[0].ndim < 2:
        return torch.cat(tensors)
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat(
        [
            pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, longest - tensor.shape[1]))
            if tensor.shape[1] < longest
            else tensor
            for tensor in tensors
        ]
    )
