"""Which rows share a pass of the transformer. A pure function of what each row costs: no tensors, no model.

A row is a (state, step) of any timestep and any prompt. The rows of a pass are padded to the longest of them, so a pass
costs rows · longest tokens.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def runs_of_equal(rows: Ints) -> list[slice]:
    """Which rows of [R, C] follow each other and are equal, as slices that together are all of them."""
    ends = [0, *(np.flatnonzero((rows[1:] != rows[:-1]).any(1)) + 1).tolist(), len(rows)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def pack(tokens: Ints, budget: int) -> list[Ints]:
    """Passes over rows of `tokens` [R] each: the row numbers of every pass, every row in one of them.

    A pass holds at most `budget` tokens, padding included, or one row that is larger alone. There are as few passes as
    can be, and rows of equal cost are spread evenly over theirs. What the passes look like depends on the rows' costs
    alone, not on their order.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    rows = np.argsort(-tokens, kind="stable")  # the longest first; rows of equal cost keep their order
    greedy: list[Ints] = []
    start = 0
    while start < len(rows):  # as many as fit behind the longest that is left: no other division has fewer passes
        fit = max(1, budget // int(tokens[rows[start]]))
        greedy.append(rows[start : start + fit])
        start += fit
    even = np.array_split(rows, max(1, len(greedy)))
    return even if greedy and all(len(part) * tokens[part[0]] <= budget or len(part) == 1 for part in even) else greedy
