"""The same values laid out otherwise in memory, with NaN around them."""

import torch


def transposed(t):
    return t.transpose(1, -1).contiguous().transpose(1, -1)


def every_second_element(t):
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def every_second_row(t):
    wide = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype)
    wide[::2] = t
    return wide[::2]


def rows_in_wider_rows(t):
    wide = torch.full((t.shape[0], t[0].numel() + 5), torch.nan, dtype=t.dtype)
    wide[:, 3:-2] = t.flatten(1)
    return wide[:, 3:-2].unflatten(1, t.shape[1:])


def one_element_off(t):
    """A contiguous tensor that starts 4 (or 2) bytes behind an aligned address, in a storage full of NaN."""
    storage = torch.full((t.numel() + 18,), torch.nan, dtype=t.dtype)
    start = 1 + (-storage.data_ptr() // t.itemsize) % (16 // t.itemsize)
    storage[start : start + t.numel()] = t.flatten()
    return storage[start : start + t.numel()].view(t.shape)


def rows_at_every_alignment(t):
    """Rows whose addresses differ modulo 16 bytes."""
    wide = torch.full((t.shape[0], (t[0].numel() + 7) // 8 * 8 + 1), torch.nan, dtype=t.dtype)
    wide[:, : t[0].numel()] = t.flatten(1)
    return wide[:, : t[0].numel()].unflatten(1, t.shape[1:])


def lazily_negated(t):
    """A view whose values are the negative of what lies in memory."""
    return torch._neg_view(-t)


LAYOUTS = (
    transposed,
    every_second_element,
    every_second_row,
    rows_in_wider_rows,
    one_element_off,
    rows_at_every_alignment,
    lazily_negated,
)
