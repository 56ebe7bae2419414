"""Where the window stands: DESIGN §3.2, and mistakes 1 and 3 of PRIOR_ART §3."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowgrove.recipe.schema import Window
from flowgrove.recipe.windows import window_steps
from planner_cases import user_error
from subprocesses import python

MOVING = ("progressive", "random", "decay", "exp_decay", "frozen")


@st.composite
def placed_windows(draw, strategies=MOVING):
    """(window, steps, lo, hi): a window that fits into its range, which may be the default one."""
    steps = draw(st.integers(2, 40))
    low = draw(st.integers(0, steps - 2))
    high = draw(st.integers(low + 1, steps - 1))
    given_range = draw(st.booleans())
    if not given_range:
        low, high = 0, steps - 1
    size = draw(st.integers(1, high - low))
    window = Window(
        strategy=draw(st.sampled_from(strategies)),
        size=size,
        every=draw(st.integers(1, 15)),
        stride=draw(st.integers(1, 5)),
        start=draw(st.integers(0, high - low - size)),
        range=(low, high) if given_range else None,
        wrap=draw(st.booleans()),
        min_every=draw(st.integers(1, 5)),
        decay_rate=draw(st.floats(0, 2)),
        decay_after=draw(st.integers(0, 20)),
    )
    return window, steps, low, high


ITERATIONS = st.integers(0, 2000)


@given(placed_windows(), ITERATIONS, st.integers(0, 2**32 - 1))
def test_a_window_is_whole_inside_its_range_and_never_holds_the_last_step(placed, iteration, seed):
    window, steps, low, high = placed
    held = list(window_steps(window, steps, iteration, seed))
    assert held == list(range(held[0], held[0] + window.size))
    assert low <= held[0]
    assert held[-1] < high <= steps - 1


@given(st.integers(2, 60), ITERATIONS)
def test_all_is_every_step_but_the_last(steps, iteration):
    assert list(window_steps(Window(strategy="all"), steps, iteration, 0)) == list(range(steps - 1))


@given(st.integers(2, 60), ITERATIONS)
def test_none_holds_no_step(steps, iteration):
    assert list(window_steps(Window(strategy="none"), steps, iteration, 0)) == []


@given(placed_windows(("progressive",)), ITERATIONS)
def test_a_progressive_window_follows_its_formula(placed, iteration):
    window, steps, low, high = placed
    n = high - window.size - low + 1
    place = window.start + window.stride * (iteration // window.every)
    expected = low + (place % n if window.wrap else min(place, n - 1))
    assert window_steps(window, steps, iteration, 0)[0] == expected


def first_steps(window, steps, iterations, seed=0):
    return [window_steps(window, steps, iteration, seed)[0] for iteration in range(iterations)]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1]),
        ({"wrap": False}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4]),
        ({"stride": 2}, [0, 0, 2, 2, 4, 4, 1, 1, 3, 3, 0, 0, 2]),
        ({"stride": 3, "wrap": False}, [0, 0, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
        ({"start": 3}, [3, 3, 4, 4, 0, 0, 1, 1, 2, 2, 3, 3, 4]),
        ({"range": (2, 7)}, [2, 2, 3, 3, 2, 2, 3, 3, 2, 2, 3, 3, 2]),
        ({"range": (2, 7), "start": 1}, [3, 3, 2, 2, 3, 3, 2, 2, 3, 3, 2, 2, 3]),
        ({"range": (2, 8), "wrap": False}, [2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
        ({"every": 1, "size": 8}, [0] * 13),
        ({"every": 1, "size": 7}, [0, 1] * 6 + [0]),
    ],
)
def test_progressive_windows_of_four_in_nine_steps(window, expected):
    assert first_steps(Window(**{"strategy": "progressive", "size": 4, "every": 2, **window}), 9, 13) == expected


@given(placed_windows(("frozen",)), ITERATIONS, ITERATIONS)
def test_a_frozen_window_stays_at_lo_plus_start(placed, one, other):
    window, steps, low, _ = placed
    assert window_steps(window, steps, one, 1)[0] == window_steps(window, steps, other, 2)[0] == low + window.start


def kept_positions(window, positions, stay, iterations):
    """Position per iteration, found the slow way: stand, wait stay(position) iterations, step on."""
    found, place = [], window.start
    while len(found) < iterations:
        position = place % positions if window.wrap else min(place, positions - 1)
        found += [position] * stay(position)
        place += window.stride
    return found[:iterations]


def linear_stay(window, last):
    """τ of `decay` in exact arithmetic."""
    return lambda at: max(
        window.min_every, math.floor(window.every * (1 - Fraction(at, last)) + window.min_every * Fraction(at, last))
    )


def exponential_stay(window):
    """τ of `exp_decay`; e to any power is positive, so its ceiling is never 0."""
    return lambda at: max(1, math.ceil(window.every * math.exp(-window.decay_rate * max(0, at - window.decay_after))))


@settings(max_examples=50)
@given(placed_windows(("decay",)))
def test_decay_keeps_each_position_for_its_linear_time(placed):
    window, steps, low, high = placed
    last = high - window.size - low
    assume(last > 0 and math.gcd(window.every - window.min_every, last) == 1)  # τ is a whole number at the ends only
    expected = kept_positions(window, last + 1, linear_stay(window, last), 200)
    assert first_steps(window, steps, 200) == [low + position for position in expected]


@pytest.mark.parametrize(("every", "size", "steps"), [(25, 4, 25), (13, 3, 16), (6, 2, 8), (31, 4, 11), (10, 1, 12)])
@pytest.mark.parametrize("wrap", [True, False])
def test_decay_times_that_are_whole_numbers_are_not_cut_by_rounding(every, size, steps, wrap):
    window = Window(strategy="decay", size=size, every=every, min_every=1, wrap=wrap)
    last = steps - 1 - size
    expected = kept_positions(window, last + 1, linear_stay(window, last), 3 * every * steps)
    assert first_steps(window, steps, len(expected)) == expected


def test_decay_by_hand():
    """every 6, min_every 2, last position 3: τ = 6, int(4.67), int(3.33), 2."""
    window = Window(strategy="decay", size=2, every=6, min_every=2)
    assert first_steps(window, 6, 18) == [0] * 6 + [1] * 4 + [2] * 3 + [3] * 2 + [0] * 3


def test_decay_with_a_single_position_stays_there():
    assert first_steps(Window(strategy="decay", size=5, every=3), 6, 20) == [0] * 20


@settings(max_examples=50)
@given(placed_windows(("exp_decay",)))
def test_exp_decay_keeps_each_position_for_its_exponential_time(placed):
    window, steps, low, high = placed
    expected = kept_positions(window, high - window.size - low + 1, exponential_stay(window), 200)
    assert first_steps(window, steps, 200) == [low + position for position in expected]


def test_exp_decay_by_hand():
    """every 4, halved at each position after 1: τ = 4, 4, 2, 1, 1."""
    window = Window(strategy="exp_decay", size=1, every=4, decay_rate=math.log(2) + 1e-9, decay_after=1)
    assert first_steps(window, 6, 14) == [0] * 4 + [1] * 4 + [2] * 2 + [3, 4] + [0] * 2


def test_exp_decay_visits_every_position_however_steep_it_is():
    window = Window(strategy="exp_decay", size=1, every=2, decay_rate=1000.0, decay_after=1)
    assert first_steps(window, 6, 9) == [0, 0, 1, 1, 2, 3, 4, 0, 0]


def test_a_random_window_visits_all_positions_and_no_others():
    window = Window(strategy="random", size=3, range=(2, 9))
    assert set(first_steps(window, 12, 300, seed=7)) == {2, 3, 4, 5, 6}


def test_a_random_window_depends_on_seed_and_iteration_alone():
    window = Window(strategy="random", size=3)
    drawn = first_steps(window, 25, 60, seed=7)
    random.seed(99)
    state = random.getstate()
    assert first_steps(window, 25, 60, seed=7) == drawn
    assert random.getstate() == state
    assert [window_steps(window, 25, iteration, 7)[0] for iteration in reversed(range(60))] == drawn[::-1]
    assert len(set(drawn)) > 10
    assert sum(before != after for before, after in itertools.pairwise(drawn)) > 45  # a new draw in every iteration
    assert first_steps(window, 25, 60, seed=8) != drawn


def test_mistake_3_ranks_draw_the_same_random_windows():
    window = Window(strategy="random", size=3)
    code = """if True:
        import random
        from flowgrove.recipe.schema import Window
        from flowgrove.recipe.windows import window_steps
        random.seed()
        print([window_steps(Window(strategy="random", size=3), 25, iteration, 42)[0] for iteration in range(40)])
    """
    told = python("-c", code, env={"PYTHONHASHSEED": "12345", "RANK": "1"}).stdout
    assert told.strip() == str(first_steps(window, 25, 40, seed=42))


@pytest.mark.parametrize("strategy", [s for s in MOVING if s != "frozen"])
@pytest.mark.parametrize("wrap", [True, False])
def test_mistake_1_windows_stay_whole_through_the_end_of_the_schedule(strategy, wrap):
    window = Window(strategy=strategy, size=4, every=3, wrap=wrap)
    held = [list(window_steps(window, 25, iteration, 1)) for iteration in range(400)]
    assert all(steps == list(range(steps[0], steps[0] + 4)) and steps[-1] <= 23 for steps in held)
    assert max(steps[-1] for steps in held) == 23  # the end was reached


@pytest.mark.parametrize("strategy", ["progressive", "decay", "exp_decay"])
def test_mistake_1_windows_roll_back_to_the_start(strategy):
    starts = first_steps(Window(strategy=strategy, size=4, every=5), 25, 300)
    end = starts.index(20)
    assert starts[:end] == sorted(starts[:end])
    assert 0 in starts[end:]
    assert set(starts) == set(range(21))


def test_mistake_1_windows_that_do_not_wrap_stay_at_the_end():
    for strategy in ("progressive", "decay", "exp_decay"):
        starts = first_steps(Window(strategy=strategy, size=4, every=5, wrap=False), 25, 300)
        assert starts == sorted(starts)
        assert starts[-1] == 20


@pytest.mark.parametrize("strategy", MOVING)
@pytest.mark.parametrize(("size", "range_"), [(9, None), (3, (2, 4)), (100, None)])
def test_a_window_larger_than_its_range_is_an_error_that_names_the_key(strategy, size, range_):
    text = user_error(window_steps, Window(strategy=strategy, size=size, range=range_), 9, 0, 0)
    assert "rollout.window.size" in text
    assert str(size) in text


@pytest.mark.parametrize("strategy", MOVING)
@pytest.mark.parametrize("range_", [(3, 3), (5, 3), (-1, 4), (0, 9), (0, 10), (8, 12)])
def test_a_range_outside_the_schedule_is_an_error_that_names_the_key(strategy, range_):
    text = user_error(window_steps, Window(strategy=strategy, size=1, range=range_), 9, 0, 0)
    assert "rollout.window.range" in text


def test_a_frozen_window_past_the_end_is_an_error_that_names_the_key():
    assert list(window_steps(Window(strategy="frozen", size=4, start=4), 9, 0, 0)) == [4, 5, 6, 7]
    assert "rollout.window.start" in user_error(window_steps, Window(strategy="frozen", size=4, start=5), 9, 0, 0)
