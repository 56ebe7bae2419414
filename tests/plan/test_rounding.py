"""What `flowgrove plan` tells of rollout.precision, counted before anything is loaded, against a loaded model."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine_cases import succeed, tiny_recipe
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import QuantisedLinear
from flowgrove.plan.memory import MemoryModel
from flowgrove.plan.planner import make_plan
from flowgrove.plan.rounding import count_rounding
from policy_cases import CPU, small_recipe

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")


def recipe_of(**model):
    model = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False} | model
    return small_recipe(model=model, rollout={"precision": "int8"})


@pytest.fixture(scope="module")
def policy():
    return Policy.load(recipe_of(), CPU)


def layers_of(policy):
    return [one for one in policy.cheap().adapter.transformer.modules() if isinstance(one, QuantisedLinear)]


def test_bytes_and_flops_are_those_of_the_loaded_model(policy):
    recipe, layers = recipe_of(), layers_of(policy)
    found = count_rounding(recipe)
    numbers = sum(layer.codes.numel() for layer in layers)
    assert found.layers == len(layers)
    assert found.full_bytes == 4 * sum(weight.numel() for weight in policy.transformer.parameters())
    copy = sum(layer.codes.nbytes + layer.scale.nbytes for layer in layers)
    assert found.full_bytes - found.rounded_bytes == 4 * numbers - copy
    assert MemoryModel(recipe, make_plan(recipe, 0), "cpu").resident(4096)["rounded copy"] == copy
    tokens = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, inputs, _: tokens.append(2 * inputs[0][..., 0].numel() * layer.codes.numel())
        )
        for layer in layers
    ]
    cheap, geometry = policy.cheap(), policy.adapter.geometry
    blank = cheap.adapter.blank(1, torch.float32)
    cheap.adapter.velocity(torch.zeros(1, *geometry.latent_shape), torch.ones(1), blank, 1.0)
    for hook in hooks:
        hook.remove()
    assert found.rounded_flops == sum(tokens)
    assert 0.5 < found.rounded_flops / found.flops < 1


def test_without_a_precision_nothing_is_rounded():
    recipe = small_recipe()
    assert count_rounding(recipe) is None
    assert MemoryModel(recipe, make_plan(recipe, 0), "cpu").resident(4096)["rounded copy"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_prediction_of_a_pass_in_8_bits_holds(dtype):
    """Of a large pass, against PyTorch's profiler."""
    recipe = recipe_of(dtype=dtype)
    policy = Policy.load(recipe, CPU)
    rows = 24
    model = MemoryModel(recipe, make_plan(recipe, 0), "cpu")
    predicted = model._once("cheap", rows, model._rolling_cheaply)
    longest = policy.adapter.blank(rows, policy.compute_dtype)
    x, sigma = torch.randn(rows, *policy.adapter.latent_shape), torch.full((rows,), 0.5)
    cheap = policy.cheap()

    @torch.no_grad()
    def roll():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            cheap.adapter.velocity(x, sigma, longest, 1.0)

    roll()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        roll()
    events = prof.profiler.kineto_results.events()
    live = most = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        most = max(most, live)
    assert predicted == pytest.approx(most, rel=0.15)


def test_the_command_shows_which_steps_are_cheap(tmp_path):
    recipe = tiny_recipe(tmp_path, rollout={"precision": "int8", "steps": 6})
    shown = succeed("plan", recipe).stdout
    lines = [line for line in shown.splitlines() if line.rstrip().endswith("int8")]
    assert [line.split()[0] for line in lines] == ["2", "3", "4", "5"]
    assert "int8 in 4 of 6 steps, 16 of 21 rollout forwards per prompt" in shown
    content = json.loads(succeed("plan", recipe, "--json").stdout)
    assert content["rounding"]["steps"] == [2, 3, 4, 5]
    assert content["rounding"]["rollout_forwards"] == 16
    assert content["rounding"]["rounded_bytes"] < content["rounding"]["full_bytes"]
    plain = tiny_recipe(tmp_path, rollout={"steps": 6})
    assert "rounding" not in json.loads(succeed("plan", plain, "--json").stdout)
    assert "int8" not in succeed("plan", plain).stdout
