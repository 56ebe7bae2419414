"""How the cost of the scaling benchmark grows: the exponent of a sweep, and the points that tell it."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def exponent(rows: Sequence[Row]) -> float:
    """The slope of log seconds over log forward equivalents: 1 where cost is linear.
    Small iterations, which fixed costs govern, are left out.
    """
    upper = upper_half(rows)
    x, y = ([math.log(row[key]) for row in upper] for key in ("forward_equivalents", "seconds"))
    return statistics.linear_regression(x, y).slope


def upper_half(rows: Sequence[Row]) -> Sequence[Row]:
    """The larger points of a sweep, with the middle one of an odd number."""
    return rows[len(rows) // 2 :]
