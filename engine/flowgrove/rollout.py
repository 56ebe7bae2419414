"""The rollout: every level of the forest in one batch, every distinct state through the model once."""

from contextlib import nullcontext

import torch
from torch import Tensor

from flowgrove.forest import Forest
from flowgrove.models.policy import Policy, Prompts
from flowgrove.plan import RolloutPlan
from flowgrove.spans import span
from flowgrove_kernels import INITIAL_STEP, NoiseKey, StepCoefficients, clean_estimate, flow_step, philox_normal


@torch.no_grad()
def rollout(
    plan: RolloutPlan, rows: StepCoefficients, policy: Policy, prompts: Prompts, *,
    seed: int, iteration: int, first_prompt: int = 0, share: bool = True, tuned_steps: int | None = None,
) -> Forest:  # fmt: skip
    """Runs the plan for `prompts`, of which the first is number `first_prompt` of the iteration. `rows`: the plan's rows on the policy's device.

    `share` False runs every leaf's trajectory for itself, as the published loops do: the same forest, at their cost.
    `tuned_steps`: the steps that the trained model runs, the untouched one those after them; None: all.
    """
    count, shape = len(prompts.texts), policy.adapter.latent_shape
    forest = Forest.allocate(plan, count, shape, policy.state_dtype, policy.device)
    lanes = plan.roots if share else plan.leaves  # rows per prompt
    prompt_of, node = _rows(count, lanes, plan.roots, policy.device)
    x = philox_normal((len(node), *shape), NoiseKey(seed, iteration, INITIAL_STEP, first_prompt + prompt_of, node)).to(policy.state_dtype)
    logp: Tensor | None = None
    history: Tensor | None = None
    for step in plan.steps:
        forest.keep(step.index, x, logp)
        fanout = step.fanout if share else 1
        sigma = torch.full((len(x),), step.sigma, dtype=torch.float32, device=policy.device)
        with span(f"step {step.index}"):
            untouched = tuned_steps is not None and step.index >= tuned_steps
            with span("transformer"), policy.untouched() if untouched else nullcontext():
                v, v_uncond, scale = policy.velocity_in_passes(x, sigma, prompts, prompt_of)
            lanes *= fanout
            parent = node.repeat_interleave(fanout)
            child_prompt, node = _rows(count, lanes, step.nodes_out, policy.device)
            key = NoiseKey(seed, iteration, step.index, first_prompt + child_prompt, node, parent) if step.stochastic else None
            with span("flow_step"):
                x_next, logp = flow_step(
                    x, v, rows[torch.full_like(prompt_of, step.index)], key=key, history=history, fanout=fanout,
                    sibling_correlation=plan.sibling_correlation if key else 0.0, v_uncond=v_uncond, guidance_scale=scale,
                )  # fmt: skip
                multistep = step.index + 1 < len(plan.steps) and plan.steps[step.index + 1].solver == step.solver == "dpmpp_2m"
                history = clean_estimate(x, v, sigma, v_uncond=v_uncond, guidance_scale=scale) if multistep else None
        x, prompt_of = x_next, child_prompt
    forest.keep(len(plan.steps), x, logp)
    forest.leaves = x
    return forest


def _rows(prompts: int, lanes: int, nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, node) of every row of a level with `nodes` distinct states in `lanes` rows per prompt: int64 [prompts · lanes]."""
    rows = torch.arange(prompts * lanes, device=device)
    return rows // lanes, rows % lanes // (lanes // nodes)
