"""Noise as a function: Philox4x32-10 counters turned into normals.

They are the same on every device, for every batch, order and rank.

    counter = (block, node, step, prompt), key = (seed, iteration), block = ⌊i/4⌋ for element i of a contiguous sample
    u = ((r >> 9) + ½)·2⁻²³;   (z0, z1) = √(−2 ln u0)·(cos, sin)(2π·u1), (z2, z3) the same of (u2, u3)

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC11); Box and Muller (1958).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowgrove_kernels.arguments import is_integer, wrong
from flowgrove_kernels.backends import implementation, implements

INITIAL_STEP = 2**32 - 1  # the step word of x_T
SHARED_STEP = 2**31  # added to the step word for the component that siblings share
WORD_NAMES = ("seed", "iteration", "step", "prompt", "node", "parent")  # the rows of a packed key
_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TWO_PI = 6.2831854820251465  # fl32(2π)


@dataclass(frozen=True, eq=False)
class _Packed:
    """A packed key and the words that are its rows."""

    tensor: Tensor  # int64 [6, rows]
    words: list[int | Tensor | None]


@dataclass(frozen=True, eq=False)
class NoiseKey:
    """Names the noise of each row.

    Fields are ints (the same for all rows) or int64 tensors [rows], every value in [0, 2³²). An int out of range is a
    ValueError where the key is used; the values of a tensor are checked where they lie, so that one out of range is a
    RuntimeError on a CPU and on a GPU the end of the program's use of it.

    prompt: global index in the iteration; step: step of the schedule, `INITIAL_STEP` for x_T; node: index of the child
    in the full forest of its prompt, at the level after the step; parent: index of the child's parent in the level
    before, needed only for correlated siblings.
    """

    seed: int | Tensor
    iteration: int | Tensor
    step: int | Tensor
    prompt: int | Tensor
    node: int | Tensor
    parent: int | Tensor | None = None
    _tensor: Tensor | _Packed | None = field(default=None, repr=False)  # what `packed` made of the words

    def __post_init__(self) -> None:
        """`replace` hands the tensor on: it holds only for the words that it was made of."""
        known, words = self._tensor, self.words()
        if isinstance(known, Tensor):
            known = _Packed(known, words)
        elif known is not None and any(mine is not its for mine, its in zip(words, known.words, strict=True)):
            known = None
        object.__setattr__(self, "_tensor", known)

    def __getstate__(self) -> dict[str, Any]:
        """In a copy the words and the tensor would no longer share memory."""
        return self.__dict__ | {"_tensor": None}

    def words(self) -> list[int | Tensor | None]:
        """The fields in the order of `WORD_NAMES`."""
        return [getattr(self, name) for name in WORD_NAMES]

    def pack(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        """int64 [6, rows] on `device`: seed, iteration, step, prompt, node, parent (0 if none).

        The stride is 0 where every row has the same.

        Raises ValueError for an int out of range or a tensor of another length; the ops
        check the values of tensors where they lie.
        """
        known = self._tensor.tensor if isinstance(self._tensor, _Packed) else None
        if known is not None and known.shape[1] == rows and (device is None or known.device == torch.device(device)):
            return known
        values = [*self.words()[:-1], 0 if self.parent is None else self.parent]
        for name, value in zip(WORD_NAMES, values, strict=True):
            _check_word(name, value, rows, device)
        numbers = torch.tensor(
            [0 if isinstance(value, Tensor) else value for value in values], dtype=torch.int64, device="cpu"
        )
        column = numbers.to(device, non_blocking=True).unsqueeze(1).expand(6, rows)
        if not any(isinstance(value, Tensor) for value in values):
            return column
        return torch.stack(
            [
                value.to(device).expand(rows) if isinstance(value, Tensor) else column[i]
                for i, value in enumerate(values)
            ]
        )

    def packed(self, rows: int, device: torch.device | str | None = None) -> "NoiseKey":
        """The same key as device tensors that lie as the ops want them: they launch nothing to read it, and
        a captured graph may change it in place.
        """
        tensor = self.pack(rows, device).contiguous()
        seed, iteration, step, prompt, node, parent = tensor
        return NoiseKey(seed, iteration, step, prompt, node, None if self.parent is None else parent, tensor)

    @classmethod
    def of_packed(cls, tensor: Tensor) -> "NoiseKey":
        """The key whose words are the rows of `tensor`, int64 [6, rows], in the order of `WORD_NAMES`.

        Changing the tensor in place changes the noise. Raises ValueError for another tensor.
        """
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape[0] != 6:
            wrong("the packed key", tensor, "pass int64 [6, rows]")
        seed, iteration, step, prompt, node, parent = tensor
        return cls(seed, iteration, step, prompt, node, parent, tensor)


def _check_word(name: str, value: int | Tensor | None, rows: int, device: torch.device | str | None) -> None:
    if not isinstance(value, Tensor):
        if not is_integer(value) or not 0 <= value <= _WORD:
            wrong(f"NoiseKey.{name}", value, "write an integer in [0, 2**32)")
        return
    fits = value.ndim == 0 or (value.ndim == 1 and (value.shape[0] == rows or value.shape[0] == 1))
    nowhere = value.device.type == "meta" and device is not None and torch.device(device).type != "meta"
    if value.dtype != torch.int64 or not fits or nowhere:
        wrong(f"NoiseKey.{name}", value, f"pass an int or an int64 tensor [{rows}] with values", place=True)


def require_words(packed: Tensor, *, shared: bool = False) -> None:
    """Fails, on the device, if a word of `NoiseKey.pack` is out of range; `shared`: for correlated siblings."""
    for name, column in zip(WORD_NAMES, packed, strict=True):
        torch._assert_async(
            ((column >= 0) & (column <= _WORD)).all(), f"NoiseKey.{name} holds a value outside [0, 2**32)"
        )
    if shared:
        torch._assert_async(
            (packed[2] < SHARED_STEP - 1).all(), "NoiseKey.step must be below 2**31 - 1 for correlated siblings"
        )


def philox_words(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words → four words.

    All are int64 tensors with values in [0, 2³²) that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # 64-bit products; int64 wraps to the right bits
        c0, c1, c2, c3 = (
            ((second >> 32) & _WORD) ^ c1 ^ k0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ c3 ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def normals(packed: Tensor, elements: int, *, shared: bool = False) -> Tensor:
    """fp32 [rows, elements] of standard normals for `NoiseKey.pack`'s int64 [6, rows]; `shared`:
    the component that siblings have in common.
    """
    seed, iteration, step, prompt, node, parent = packed.unsqueeze(-1)  # each [rows, 1]
    blocks = torch.arange((elements + 3) // 4, device=packed.device)  # [blocks]
    if shared:
        step, node = step + SHARED_STEP, parent
    words = philox_words((blocks, node, step, prompt), (seed, iteration))
    u0, u1, u2, u3 = (((word >> 9).to(torch.float32) + 0.5) * 2.0**-23 for word in words)
    pairs = []
    for radius_word, angle_word in ((u0, u1), (u2, u3)):
        radius, angle = torch.sqrt(-2 * torch.log(radius_word)), _TWO_PI * angle_word
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :elements]


def sibling_normals(packed: Tensor, elements: int, correlation: float) -> Tensor:
    """fp32 [rows, elements]: √ρ·ξ_shared + √(1−ρ)·ξ_own, standard normal in every row, correlated ρ between
    rows of one parent (BranchGRPO 2509.06040).
    """
    require_words(packed, shared=correlation > 0)
    own = normals(packed, elements)
    if correlation == 0.0:
        return own
    return math.sqrt(correlation) * normals(packed, elements, shared=True) + math.sqrt(1 - correlation) * own


def given_or_drawn(noise: Tensor | None, packed: Tensor | None, shape: torch.Size, correlation: float) -> Tensor:
    """z as [rows, elements] `shape`: the noise that the caller gave, else what the key names."""
    if noise is not None:
        return noise.reshape(shape)
    if packed is None:
        raise ValueError("a noise key or the noise itself is needed")
    return sibling_normals(packed, shape[1], correlation)


@implements("philox_normal", "reference")
def _reference(key: Tensor, elements: int) -> Tensor:
    require_words(key)
    return normals(key, elements).contiguous()


@torch.library.custom_op("flowgrove::philox_normal", mutates_args=())
def _philox_normal(key: Tensor, elements: int) -> Tensor:
    return implementation("philox_normal", key)(key, elements)


@_philox_normal.register_fake
def _(key: Tensor, elements: int) -> Tensor:
    return key.new_empty((key.shape[1], elements), dtype=torch.float32)


def philox_normal(
    shape: tuple[int, ...] | torch.Size, key: NoiseKey, *, device: torch.device | str | None = None
) -> Tensor:
    """fp32 `shape` of standard normals; shape[0] is the number of rows, `key` names each (scalars or [rows]).

    `device`: default the key's tensors' device, else the CPU. Raises ValueError for another shape, or a key that does
    not fit it.
    """
    if not isinstance(shape, tuple | list) or len(shape) == 0 or not all(is_integer(n) and n >= 0 for n in shape):
        wrong("the shape of philox_normal", shape, "write (rows, ...), integers >= 0")
    if not isinstance(key, NoiseKey):
        wrong("key", key, "pass a NoiseKey")
    if device is None:
        device = next((word.device for word in key.words() if isinstance(word, Tensor)), torch.device("cpu"))
    elements = math.prod(shape[1:])
    return torch.ops.flowgrove.philox_normal(key.pack(shape[0], device), elements).view(shape)
