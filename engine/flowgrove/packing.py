"""Which rows share a pass of the transformer. A pure function of what each row costs: no tensors, no model.

A row is a (state, step) of any timestep and any prompt. The rows of a pass are padded to the longest of them, so a pass costs rows · longest tokens.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def pack(tokens: Ints, budget: int, bucket: Ints | None = None) -> list[Ints]:
    """Passes over rows of `tokens` [R] each: the row numbers of every pass, every row in one of them.

    A pass holds at most `budget` tokens, padding included, or one row that is larger alone. Rows of different `bucket` [R] (sizes of a picture, which
    cannot stand in one tensor) never share a pass. There are as few passes as can be, and rows of equal cost are spread evenly over theirs. What the passes
    look like depends on the rows' costs alone, not on their order.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    groups = np.zeros_like(tokens) if bucket is None else np.asarray(bucket, dtype=np.int64)
    order = np.lexsort((-tokens, groups))  # the longest first; stable: rows of equal cost keep their order
    edges = np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1)) if len(order) else [0]
    return [rows for start, stop in pairwise(edges) for rows in _pack_bucket(order[start:stop], tokens, budget)]


def _pack_bucket(rows: Ints, tokens: Ints, budget: int) -> list[Ints]:
    """`rows` in falling order of cost. As many as fit behind the longest that is left: no other division has fewer passes."""
    greedy: list[Ints] = []
    start = 0
    while start < len(rows):
        fit = max(1, budget // int(tokens[rows[start]]))
        greedy.append(rows[start : start + fit])
        start += fit
    even = np.array_split(rows, len(greedy))
    return even if all(len(part) * tokens[part[0]] <= budget or len(part) == 1 for part in even) else greedy
