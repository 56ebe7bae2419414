"""Whether an iteration keeps the reference model's velocities, which do not change with the weights that train."""

from flowgrove.plan.planner import RolloutPlan
from flowgrove.recipe.schema import Recipe


def keeps_reference_velocities(recipe: Recipe, plan: RolloutPlan, divided: bool) -> bool:
    """Whether a state's is computed once for all that compare with it: where several updates or a measurement of the
    gradient's noise in this iteration do. `divided`: whether ranks have divided the weights.

    In bf16 a velocity depends on its batch, so that the reference runs in the very passes that train; and ranks that
    have divided the weights run all passes together.
    """
    several = plan.updates > 1 or recipe.run.measures_noise(plan.iteration)
    exact = recipe.engine.share and recipe.model.dtype != "bf16" and not divided
    return recipe.update.kl_weight > 0 and several and exact
