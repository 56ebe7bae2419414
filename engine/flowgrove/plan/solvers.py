"""Solvers and dynamics by the names of recipes: all that planner, rollout and coefficients know of one is its row.

A new one is a row here, its coefficients under the same name in `flowgrove_kernels.coefficients`, and its name in the
choices of rollout.dynamics or rollout.tail.solver (`recipe/schema/rollout.py`). Nothing here needs a tensor.
"""

from itertools import pairwise
from typing import NamedTuple


class Solver(NamedTuple):
    """How a step of this name runs.

    `stochastic`: its children draw noise, so that it can branch and train.
    `start`: for a solver with history, which uses the clean estimate of the step before it (multistep), the name of
    the coefficients that a step takes where that step was not of the same solver; None: a solver without history.
    """

    stochastic: bool = False
    start: str | None = None


PLAIN = "ode"  # Euler: what a step without noise and outside a tail takes
SOLVERS = {
    PLAIN: Solver(),
    "dpmpp_2m": Solver(start=PLAIN),
    "flow_sde": Solver(stochastic=True),
    "dance_sde": Solver(stochastic=True),
    "wan_sde": Solver(stochastic=True),
    "cps": Solver(stochastic=True),
}


def history(names: list[str]) -> list[bool]:
    """For the solver of every step, and for the end after them, whether the step takes the clean estimate of the one
    before it: where both are of one solver with history.
    """
    same = (before == name and SOLVERS[name].start is not None for before, name in pairwise(names))
    return [False, *same, False]
