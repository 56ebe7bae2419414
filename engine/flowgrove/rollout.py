"""The rollout: every level of the forest in one batch, every distinct state through the model once."""

import torch
from torch import Tensor

from flowgrove.forest import Forest
from flowgrove.models.policy import Policy, Prompts
from flowgrove.plan import RolloutPlan
from flowgrove_kernels import INITIAL_STEP, NoiseKey, StepCoefficients, clean_estimate, flow_step, philox_normal


@torch.no_grad()
def rollout(plan: RolloutPlan, rows: StepCoefficients, policy: Policy, prompts: Prompts, *, seed: int, iteration: int, first_prompt: int = 0) -> Forest:
    """Runs the plan for `prompts`, of which the first is number `first_prompt` of the iteration. `rows`: the plan's rows on the policy's device."""
    count, shape = len(prompts.texts), policy.adapter.latent_shape
    forest = Forest.allocate(plan, count, shape, policy.state_dtype, policy.device)
    prompt_of, node = _nodes(count, plan.roots, policy.device)
    x = philox_normal((len(node), *shape), NoiseKey(seed, iteration, INITIAL_STEP, first_prompt + prompt_of, node)).to(policy.state_dtype)
    logp: Tensor | None = None
    history: Tensor | None = None
    for step in plan.steps:
        forest.keep(step.index, x, logp)
        sigma = torch.full((len(x),), step.sigma, dtype=torch.float32, device=policy.device)
        v, v_uncond = policy.velocity_in_passes(x, sigma, prompts, prompt_of)
        parent = node.repeat_interleave(step.fanout)
        child_prompt, node = _nodes(count, step.nodes_out, policy.device)
        key = NoiseKey(seed, iteration, step.index, first_prompt + child_prompt, node, parent) if step.stochastic else None
        x_next, logp = flow_step(
            x, v, rows[torch.full_like(prompt_of, step.index)], key=key, history=history, fanout=step.fanout,
            sibling_correlation=plan.sibling_correlation if key else 0.0, v_uncond=v_uncond, guidance_scale=policy.guidance_scale,
        )  # fmt: skip
        multistep = step.index + 1 < len(plan.steps) and plan.steps[step.index + 1].solver == step.solver == "dpmpp_2m"
        history = clean_estimate(x, v, sigma, v_uncond=v_uncond, guidance_scale=policy.guidance_scale) if multistep else None
        x, prompt_of = x_next, child_prompt
    forest.keep(len(plan.steps), x, logp)
    forest.leaves = x
    return forest


def _nodes(prompts: int, nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(prompt, node) of every row of a level, int64 [prompts · nodes]."""
    rows = torch.arange(prompts * nodes, device=device)
    return rows // nodes, rows % nodes
