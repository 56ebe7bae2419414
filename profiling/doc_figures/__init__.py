"""What README and docs show of profiling/figures/*.csv: the tables, the numbers in their sentences, and the plots.

`registry` says how a table, a sentence or a plot is registered; every module below it registers those of one kind when
it is imported; `pages` puts them into the pages, `drawings` draws. `profiling/make_figures.py` is the command.
"""

from doc_figures import (
    busy_machine,
    compared,
    engine,
    gradient_variance,
    ops,
    plan_time,
    quickstart,
    recipes,
    row_times,
    scaling,
    signal_to_noise,
    span_cost,
)

__all__ = [
    "busy_machine",
    "compared",
    "engine",
    "gradient_variance",
    "ops",
    "plan_time",
    "quickstart",
    "recipes",
    "row_times",
    "scaling",
    "signal_to_noise",
    "span_cost",
]
