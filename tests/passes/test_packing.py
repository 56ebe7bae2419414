"""The packer: every row once, the budget kept, few and even passes that depend on the rows' costs alone."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flowgrove.passes.packing import pack, runs_of_equal

ROWS = st.lists(st.integers(1, 600), max_size=60)
BUDGET = st.integers(1, 2000)


def shapes(passes, tokens):
    """What the transformer sees: the costs of the rows of each pass."""
    return sorted(tuple(sorted(tokens[rows].tolist())) for rows in passes)


@given(ROWS, BUDGET)
def test_every_row_is_in_one_pass(rows, budget):
    passes = pack(np.array(rows, dtype=np.int64), budget)
    assert sorted(np.concatenate(passes).tolist() if passes else []) == list(range(len(rows)))
    assert all(len(part) for part in passes)


@given(ROWS, BUDGET)
def test_padded_tokens_keep_the_budget(rows, budget):
    tokens = np.array(rows, dtype=np.int64)
    for part in pack(tokens, budget):
        assert len(part) == 1 or len(part) * tokens[part].max() <= budget


@given(ROWS, BUDGET, st.randoms(use_true_random=False))
def test_passes_do_not_depend_on_the_order_of_the_rows(rows, budget, random):
    tokens = np.array(rows, dtype=np.int64)
    mixed = np.array(random.sample(rows, len(rows)), dtype=np.int64)
    assert shapes(pack(mixed, budget), mixed) == shapes(pack(tokens, budget), tokens)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 80))
def test_no_division_has_fewer_passes(tokens, budget):
    fewest = fewest_passes(tuple(sorted(tokens)), budget)
    assert len(pack(np.array(tokens), budget)) == fewest


def fewest_passes(tokens, budget):
    """By trying every division into passes."""
    best = len(tokens)

    def place(left, parts):
        nonlocal best
        if len(parts) >= best and left:
            return
        if not left:
            best = min(best, len(parts))
            return
        row, rest = left[-1], left[:-1]
        for index, part in enumerate(parts):
            if (len(part) + 1) * max(*part, row) <= budget:
                place(rest, [*parts[:index], (*part, row), *parts[index + 1 :]])
        place(rest, [*parts, (row,)])

    place(tokens, [])
    return best


@given(st.integers(1, 500), st.integers(1, 64), BUDGET)
def test_equal_rows_are_spread_evenly_in_their_order(count, tokens, budget):
    passes = pack(np.full(count, tokens), budget)
    fit = max(1, budget // tokens)
    assert len(passes) == -(-count // fit)
    assert max(map(len, passes)) - min(map(len, passes)) <= 1
    assert np.concatenate(passes).tolist() == list(range(count)), "rows that follow each other need no copy"


def test_no_rows_make_no_pass():
    assert pack(np.array([], dtype=np.int64), 100) == []


def test_runs_of_equal_rows_follow_each_other():
    rows = np.array([[3, 1], [3, 1], [3, 2], [3, 1], [4, 0], [4, 0]])
    assert runs_of_equal(rows) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert runs_of_equal(rows[:1]) == [slice(0, 1)]
    assert runs_of_equal(np.empty((0, 2), dtype=np.int64)) == []
