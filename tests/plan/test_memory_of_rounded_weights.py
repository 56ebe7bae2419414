"""Predicted memory of training passes over frozen weights in few bits, against what the allocator hands out.

In fp32: a CPU, unlike a GPU, casts whole tensors where a bf16 product meets its fp32 scale.
"""

import pytest
import torch

from flowgrove.models.policy import Policy
from flowgrove.plan.memory import predict_memory
from flowgrove.plan.planner import make_plan
from memory_cases import allocated
from policy_cases import CPU, encoded, small_recipe
from tiny_families import MODELS

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

LORA = {"rank": 4, "alpha": 8}


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["flux", "qwen_image", "wan"])
def test_prediction_of_a_training_pass_holds(folders, name, precision, checkpointing):
    model = {
        **MODELS[name],
        "path": folders[name],
        "dtype": "fp32",
        "lora": LORA,
        "base_precision": precision,
        "gradient_checkpointing": checkpointing,
    }
    recipe = small_recipe(model=model, data={"prompts": "unused.txt", "prompts_per_iteration": 24})
    policy = Policy.load(recipe, CPU)
    found = predict_memory(recipe, make_plan(recipe, 0), "cpu")
    prompts = encoded(policy, ["a red circle " * 40] * 24)
    x = torch.randn(found.rows, *policy.adapter.latent_shape)
    for parameter in policy.weights.trainable().values():
        parameter.grad = torch.zeros_like(parameter)

    def train():
        v = policy.velocity(x, torch.full((found.rows,), 0.5), prompts, torch.zeros(found.rows, dtype=torch.int64)).v
        v.backward(torch.ones_like(v))

    train()
    assert found.stages["training"] == pytest.approx(allocated(train), rel=0.15)
    weights = sum(tensor.nbytes for tensor in (*policy.transformer.parameters(), *policy.transformer.buffers()))
    assert found.resident["transformer"] == pytest.approx(weights, rel=0.05)
