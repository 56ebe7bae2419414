"""What the tests of updates share: recipes, an updater that keeps gradients,
and a policy that has moved from its reference.
"""

import torch

from flowgrove.models.policy import Policy
from flowgrove.update.updater import Updater
from policy_cases import CPU, runner_of

TREE = {"steps": 6, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "frozen", "size": 3}}
CASES = {
    "flat": {},
    "one_update": {"update": {"updates_per_iteration": 1}},
    "unshared_noise": {"rollout": {"shared_initial_noise": False}},
    "parents": {"update": {"partition": "parents"}},
    "tree": {"rollout": TREE},
    "tree_drawn": {"rollout": TREE, "update": {"edges_per_update": 3}},
    "tree_drawn_parents": {"rollout": TREE, "update": {"edges_per_update": 3, "partition": "parents"}},
    "detached": {"update": {"detach_unconditional": True}},
    "tree_tempflow": {"rollout": TREE, "update": {"step_weight": "tempflow"}},
    "tree_guard": {"rollout": TREE, "update": {"step_weight": "guard", "clip_range": 2e-6}},
    "tree_leaves": {
        "rollout": TREE,
        "credit": {"baseline": "siblings", "std": "leaves"},
        "update": {"step_weight": "leaves"},
    },
    "roots_unnormalised": {
        "rollout": {**TREE, "group_size": 8, "shared_initial_noise": False},
        "credit": {"baseline": "siblings", "std": "none", "prune": {"kind": "extreme", "keep": 2}},
        "update": {"step_weight": "leaves"},
    },
    "pruned": {"rollout": TREE, "credit": {"prune": {"kind": "extreme", "keep": 1}}},
    "step_fraction": {"update": {"step_fraction": 0.5}},
    "cps": {"rollout": {"dynamics": "cps"}},
    "asymmetric_clip": {"update": {"clip_range": [1e-4, 3e-3]}},
    "kl": {"update": {"kl_weight": 0.5}},
}


class Recorder(Updater):
    """Keeps the gradient of every update instead of stepping."""

    def __init__(self, recipe, policy):
        super().__init__(recipe, policy, runner_of(policy, recipe))
        self.gradients, self.trained = [], []

    def _step(self, stats, trained, iteration, number, updates):
        self.trained.append(trained)
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters])
        self.optimizer.zero_grad(set_to_none=True)


def policy_with_reference(recipe, guidance):
    """The reference is a copy of the model as it was; the trained one has moved since."""
    moved = Policy.load(
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"guidance_scale": guidance})}), CPU
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.weights.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=1e-3)
    return moved
