"""What a recipe says that its model does not take, told before and after the model is loaded."""

from flowgrove.errors import UserError
from flowgrove.models.adapter import Adapter
from flowgrove.models.families import check_split_lengths, family_of
from flowgrove.recipe.schema import Recipe


def check_family(recipe: Recipe) -> None:
    """Raises UserError for what the family does not take, before anything is loaded."""
    check_split_lengths(recipe)
    model = recipe.model
    if model.dtype not in family_of(model.adapter).dtypes:
        why = f"the {model.adapter} transformer computes positions and norms in fp32; write fp32"
        raise UserError(f"model.dtype is {model.dtype}: {why}")


def check_guidance_and_cache(recipe: Recipe, adapter: Adapter) -> None:
    """Raises UserError for keys of guidance that the loaded model has no use for, and a cache that it does not have."""
    scale, evaluated = recipe.model.guidance_scale, recipe.run.eval.guidance_scale
    if evaluated is not None and adapter.folder is not None:
        adapter.check_guidance(adapter.folder, "run.eval.guidance_scale", evaluated)
    guided = adapter.needs_uncond(recipe.largest_guidance)
    if not adapter.needs_uncond(scale):
        why = (
            "the model takes guidance as an input" if adapter.embeds_guidance else f"model.guidance_scale is {scale:g}"
        )
        if recipe.rollout.guidance_range is not None:
            raise UserError(f"rollout.guidance_range: {why}, so that no step has a second pass to leave out: remove it")
        if recipe.model.negative_prompt is not None and not guided:
            raise UserError(f"model.negative_prompt: {why}, so that nothing leads away from it: remove it")
        if recipe.model.cfg_normalization is not None and not guided:
            raise UserError(f"model.cfg_normalization: {why}, so that no velocity is guided: remove it")
        if recipe.update.detach_unconditional:
            raise UserError(f"update.detach_unconditional: {why}, so that there is no unconditional half: remove it")
    if recipe.rollout.cache is not None and not hasattr(adapter.running, "enable_cache"):
        raise UserError(f"rollout.cache: diffusers has no cache for the {recipe.model.adapter} transformer: remove it")
