"""Splits that a run chooses (`rollout.tree.splits: auto`), as a person reads them: in the log, in `flowgrove plan` and
in the report. All of it stands in the metrics lines of the run.
"""

from typing import Any

from rich.console import Console

from flowgrove.plan.split_search import Splits, SplitSearch
from flowgrove.recipe.schema import Recipe
from flowgrove.report.lines import Line


def splits_of(recipe: Recipe, line: Line) -> Splits | None:
    """The splits of a line's iteration, where the run chooses them."""
    return _told(SplitSearch.of(recipe), line, "tree_splits")


def chosen_splits(recipe: Recipe, lines: list[Line]) -> Splits | None:
    """What a run with these lines has chosen; None: nothing yet, or its splits are given."""
    search = SplitSearch.of(recipe)
    found = (_told(search, line, key) for line, key in _after_probing(search, lines))
    return next((splits for splits in found if splits is not None), None)


def _after_probing(search: SplitSearch | None, lines: list[Line]) -> list[tuple[Line, str]]:
    """The lines that tell what was chosen, the newest first, and the key that does."""
    last = -1 if search is None else search.probe - 1
    return [
        (line, "chosen_splits" if line["iteration"] == last else "tree_splits")
        for line in reversed(lines)
        if line["iteration"] >= last
    ]


def _told(search: SplitSearch | None, line: Line, key: str) -> Splits | None:
    """Splits that a line tells, if they are some of such a tree."""
    splits = line.get(key)
    if search is None or not isinstance(splits, list) or not all(type(step) is int for step in splits):
        return None
    return tuple(splits) if search.fits(tuple(splits)) else None


def evidence(recipe: Recipe, lines: list[Line]) -> dict[int, float]:
    """Step → share of the leaves' variance that it explains as a split, as the last probed iteration tells it."""
    search = SplitSearch.of(recipe)
    probed = [line for line in lines if search is not None and line["iteration"] < search.probe]
    told = probed[-1].get("split_evidence") if probed else None
    if search is None or not isinstance(told, dict):
        return {}
    return {step: told[str(step)] for step in search.candidates if isinstance(told.get(str(step)), int | float)}


def choice_sentence(recipe: Recipe, lines: list[Line]) -> str | None:
    """What was chosen, what that explains and costs; None where nothing is."""
    search, chosen, shares = SplitSearch.of(recipe), chosen_splits(recipe, lines), evidence(recipe, lines)
    if search is None or chosen is None:
        return None
    named = ", ".join(f"{step} ({shares[step]:.0%})" if step in shares else str(step) for step in chosen)
    return (
        f"the tree splits at the steps {named}, with their shares of the leaves' variance in the first {search.probe} "
        f"iterations; {search.forwards(chosen)} of {search.budget} forwards a prompt"
    )


def splits_fact(recipe: Recipe, lines: list[Line]) -> list[list[str]]:
    """[name, value, note] for the report's list of facts, where the run chooses its splits."""
    search, chosen = SplitSearch.of(recipe), chosen_splits(recipe, lines)
    if search is None:
        return []
    if chosen is None:
        return [["Splits", "not chosen yet", f"all steps take turns for {search.probe} iterations"]]
    return [["Splits", ", ".join(map(str, chosen)), choice_sentence(recipe, lines) or ""]]


def split_json(recipe: Recipe, lines: list[Line]) -> dict[str, Any]:
    """What `flowgrove plan --json` adds where splits are chosen; nothing else does."""
    search, chosen, shares = SplitSearch.of(recipe), chosen_splits(recipe, lines), evidence(recipe, lines)
    if search is None:
        return {}
    told = {"probe": search.probe, "forwards": search.budget, "chosen": None if chosen is None else list(chosen)}
    return {"splits": told | {"evidence": {str(step): share for step, share in shares.items()}}}


def draw_splits(recipe: Recipe, lines: list[Line], iteration: int, console: Console) -> None:
    """Which splits were or will be chosen, and what the probing has shown of every step."""
    search = SplitSearch.of(recipe)
    if search is None:
        return
    shares, sentence = evidence(recipe, lines), choice_sentence(recipe, lines)
    if sentence is None:
        here = "probes" if iteration < search.probe else "takes the budget, in place of what will be chosen"
        sentence = (
            f"chosen after {search.probe} iterations, within {search.budget} forwards a prompt; the tree shown {here}"
        )
    console.print(f"\nsplits: {sentence}")
    if shares:
        console.print(f"share by step: {', '.join(f'{step} {share:.0%}' for step, share in shares.items())}")
