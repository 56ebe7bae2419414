"""The coefficients of a plan's steps, one row per step."""

from flowgrove.errors import UserError
from flowgrove.plan.planner import RolloutPlan, Step
from flowgrove_kernels import StepCoefficients, step_coefficients
from flowgrove_kernels.coefficients import MULTISTEP


def plan_coefficients(plan: RolloutPlan) -> StepCoefficients:
    """fp32 rows on the CPU, row i for step i. Split steps may draw wider noise than their
    density says (`split_noise_scale`). Raises UserError for a step whose row fp32 cannot hold.
    """
    return StepCoefficients.cat([_checked_row(plan, step) for step in plan.steps])


def _checked_row(plan: RolloutPlan, step: Step) -> StepCoefficients:
    try:
        return _row(plan, step)
    except ValueError as error:
        noisy = step.stochastic and step.coefficients != "wan_sde"  # which takes no noise level
        said = f"rollout.noise_level is {plan.noise_level:g}" if noisy else f"step {step.index} of the rollout"
        raise UserError(f"{said}: {error}") from None


def _row(plan: RolloutPlan, step: Step) -> StepCoefficients:
    if step.takes_estimate:
        return MULTISTEP[step.coefficients](plan.steps[step.index - 1].sigma, step.sigma, step.sigma_next)
    if not step.stochastic:
        return step_coefficients(step.coefficients, step.sigma, step.sigma_next)
    row = step_coefficients(
        step.coefficients, step.sigma, step.sigma_next, noise_level=plan.noise_level, sigma_max=plan.sigma_max
    )
    scale = plan.split_noise_scale if step.fanout > 1 else 1.0
    return StepCoefficients(row.x_coef, row.v_coef, row.prev_coef, row.std * scale, row.precision, row.log_norm)
