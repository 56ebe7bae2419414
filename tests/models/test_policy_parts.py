"""The policy is a value: what differs is another policy of the same parts. Weights change through their own object."""

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

import flowgrove
from flowgrove.models.policy import Policy
from flowgrove.update.ema import Ema
from policy_cases import CPU, encoded, policy_of, small_recipe

MODEL = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False}


def test_what_differs_is_another_policy_of_the_same_parts():
    recipe = small_recipe(model={**MODEL, "sizes": [[32, 32], [16, 32]]}, update={"kl_weight": 0.1})
    policy = Policy.load(recipe, CPU)
    small, guided = policy.sized(recipe.at_sizes()[1]), policy.guided_by(2.5)
    with policy.reference() as reference:
        others = (small, guided, reference)
        assert all(other.weights is policy.weights and other.encoder is policy.encoder for other in others)
        assert len({policy.weights_in_use, small.weights_in_use, reference.weights_in_use}) == 3
        assert reference.adapter.transformer is policy.weights.reference_copy
    assert (policy.guidance_scale, guided.guidance_scale, small.guidance_scale) == (1.0, 2.5, 1.0)
    assert (policy.adapter.geometry.height, small.adapter.geometry.height) == (32, 16)
    assert policy.adapter.transformer is small.adapter.transformer is policy.transformer
    assert policy.guided_by(None) is policy


def test_a_policy_is_not_changed_from_outside():
    with pytest.raises(FrozenInstanceError):
        policy_of().guidance_scale = 2.0


def test_no_module_sets_an_attribute_of_a_policy_its_weights_or_its_runner():
    parts, found = {"policy", "weights", "runner", "budget"}, []
    for path in Path(flowgrove.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", None)
                if name in parts:
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@torch.no_grad()
def test_weights_that_are_loaded_or_exchanged_are_what_passes_read(dtype):
    policy = Policy.load(small_recipe(model={**MODEL, "dtype": dtype}), CPU)
    weights, x, sigma, prompt = policy.weights, torch.ones(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    prompts, ema = encoded(policy), Ema(policy.weights, 0.5)

    def velocity():
        return policy.velocity(x, sigma, prompts, prompt).v

    base, place = velocity(), weights.identity
    weights.load({name: 1.05 * p for name, p in weights.trainable().items()})
    moved = velocity()
    assert weights.identity == place, "values were copied"
    assert not torch.equal(moved, base)
    with ema.swapped_in():
        assert weights.identity != place, "recordings of other storage do not serve"
        assert torch.equal(velocity(), base)
    assert weights.identity == place
    assert torch.equal(velocity(), moved)
