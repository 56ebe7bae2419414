"""The learning rates that a search has chosen, in its comparison's folder.

They are chosen once: when a run goes on, the evaluation at its end is no longer there, and its curve reads otherwise at
the cost of the search.
"""

import json
from typing import Any

from flowgrove.compare.curves import Curve, Search, best_rates
from flowgrove.compare.runs import Comparison
from flowgrove.errors import UserError
from flowgrove.files import write_text

_NAME = "learning_rates.json"


def searched(comparison: Comparison, curves: list[Curve]) -> Search | None:
    """What the first seed has chosen, or so far; None where the comparison does not search. Raises UserError for a
    damaged file.
    """
    if comparison.search is None:
        return None
    found = best_rates(curves, comparison.axis, comparison.search)
    return Search(comparison.search, {**found, **{name: one["lr"] for name, one in _kept(comparison).items()}})


def keep_searched(comparison: Comparison, search: Search) -> None:
    """Keeps what has been chosen."""
    rates = {name: {"lr": lr, "tried": _tried(comparison, name)} for name, lr in search.rates.items()}
    text = json.dumps({**_asked(comparison), "rates": {**_kept(comparison), **rates}}, indent=1)
    write_text(comparison.out / _NAME, f"{text}\n")


def _kept(comparison: Comparison) -> dict[str, Any]:
    """Choices between the same learning rates, by the same seed at the same cost."""
    try:
        content = json.loads((comparison.out / _NAME).read_text(encoding="utf-8"))
        if {key: content[key] for key in _asked(comparison)} != _asked(comparison):
            return {}
        return {name: one for name, one in content["rates"].items() if one["tried"] == _tried(comparison, name)}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{comparison.out / _NAME} is damaged: remove it, and learning rates are chosen anew") from None


def _asked(comparison: Comparison) -> dict[str, Any]:
    return {"unit": comparison.goal.unit, "cost": comparison.search, "seed": comparison.runs[0].seed}


def _tried(comparison: Comparison, name: str) -> list[float]:
    return sorted({run.lr for run in comparison.runs if run.name == name})
