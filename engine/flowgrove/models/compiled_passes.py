"""The first passes of compiled blocks: every graph that a run will need is compiled before its first iteration, so that
none is in a later one, where another number of rows comes first.
"""

from itertools import product

from flowgrove.device import is_out_of_memory
from flowgrove.models.experts import FOLDERS, Experts
from flowgrove.models.policy import Policy
from flowgrove.recipe.schema import Recipe


def compile_ahead(policy: Policy, recipe: Recipe, most_rows: int) -> None:
    """Runs the compiled blocks of `policy` once in every way that a run of `recipe` does, in blank passes of one row
    and of two, but of no more than `most_rows`. What has no room compiles when it first runs, and so do weights that
    are divided among ranks.
    """
    if policy.weights.sharded:
        return
    transformer = policy.transformer
    experts, trained = (tuple(FOLDERS), transformer.trained) if isinstance(transformer, Experts) else ((None,), (None,))
    # one token has graphs of its own, as one row has
    texts = (None, [1]) if policy.splits_lengths and policy.adapter.shortest_text == 1 else (None,)
    for rows, expert, lengths in product(_rows(policy, recipe, most_rows), experts, texts):
        try:
            policy.of_expert(expert).idle_pass(False, rows, lengths)
            if expert in trained:
                policy.of_expert(expert).idle_pass(True, rows, lengths)
            if recipe.rollout.cheapens:
                policy.cheap().of_expert(expert).idle_pass(False, rows, lengths)
            if recipe.update.kl_weight > 0 or recipe.run.eval.tuned_share < 1:
                with policy.reference() as reference:
                    reference.of_expert(expert).idle_pass(False, rows, lengths)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        finally:
            policy.weights.drop_gradients()


def _rows(policy: Policy, recipe: Recipe, most: int) -> list[int]:
    """With guidance a pass of one state has two rows, unless they run apart."""
    if not policy.doubles:
        return [1, 2][:most]
    if policy.splits_lengths or policy.halves_apart:
        return [1, 2][:most]
    unguided = recipe.rollout.guidance_range is not None or recipe.run.eval.guidance_scale is not None
    return [1, 2] if unguided else [2]
