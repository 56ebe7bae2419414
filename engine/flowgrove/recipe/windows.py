"""Where the window of stochastic steps (MixGRPO 2507.21802) and the pruned depths stand: pure functions of the recipe
and the iteration.

Positions are counted from the start of the range: l = lo + p, p in 0 … n−1, n = hi − size − lo + 1. A window never
shrinks, is never empty and never holds the last step of the schedule.
"""

import math
import random
from collections.abc import Callable

from flowgrove.errors import UserError
from flowgrove.recipe.schema import Prune, Window


def window_steps(window: Window, steps: int, iteration: int, seed: int) -> range:
    """The steps of the window in `iteration` (0-based) of a schedule of `steps` steps;
    empty only for strategy "none".
    """
    low, high = window.range or (0, steps - 1)
    if not 0 <= low < high <= steps - 1:
        raise UserError(
            f"rollout.window.range is [{low}, {high}): write 0 <= lo < hi <= rollout.steps - 1 = {steps - 1} (the last "
            "step is never stochastic)"
        )
    if window.strategy == "none":
        return range(0)
    if window.strategy == "all":
        return range(low, high)
    if window.size > high - low:
        raise UserError(
            f"rollout.window.size is {window.size}: the range [{low}, {high}) holds {high - low} steps; "
            f"write {high - low} or less"
        )
    positions = high - window.size - low + 1
    if window.strategy == "frozen" and window.start >= positions:
        raise UserError(
            f"rollout.window.start is {window.start}: a frozen window of {window.size} steps fits up to start "
            f"{positions - 1}"
        )
    start = low + _position(window, positions, iteration, seed)
    return range(start, start + window.size)


def _position(window: Window, positions: int, iteration: int, seed: int) -> int:
    def after(moves: int) -> int:
        place = window.start + window.stride * moves
        return place % positions if window.wrap else max(0, min(place, positions - 1))

    match window.strategy:
        case "frozen":
            return window.start
        case "random":
            return random.Random(f"window/{seed}/{iteration}").randrange(positions)
        case "decay":
            return _timed(after, iteration, lambda place: _linear_stay(window, place, positions - 1))
        case "exp_decay":
            return _timed(
                after,
                iteration,
                lambda place: max(
                    1, math.ceil(window.every * math.exp(-window.decay_rate * max(0, place - window.decay_after)))
                ),
            )
        case _:
            return after(iteration // window.every)


def _linear_stay(window: Window, place: int, last: int) -> int:
    """int(every·(1 − p/L) + min_every·p/L) in whole numbers, which floats would round below some of them."""
    return max(
        window.min_every, (window.every * (last - place) + window.min_every * place) // last if last else window.every
    )


def _timed(after: Callable[[int], int], iteration: int, stay: Callable[[int], int]) -> int:
    """The position at `iteration` when each position is kept for `stay(position)` iterations."""
    moves, left = 0, iteration
    while left >= (time := stay(after(moves))):
        if after(moves) == after(moves + 1):
            break  # the end of a window that does not wrap, or the only position
        left, moves = left - time, moves + 1
    return after(moves)


def pruned_depths(prune: Prune | None, iteration: int) -> range:
    """The steps that `depth` pruning leaves out of training: `depths` of them from `first`, moving by one every `every`
    iterations until they touch `stop`.
    """
    if prune is None or prune.kind != "depth":
        return range(0)
    moves = iteration // prune.every
    if prune.direction == "later":
        start = min(prune.first + moves, max(prune.first, prune.stop - prune.depths + 1))
    else:
        start = max(prune.first - moves, min(prune.first, prune.stop))
    return range(start, start + prune.depths)
