"""engine.compile: every block of every family is compiled, and computes what it computed."""

import pytest
import torch
from torch import nn

from flowgrove.models.policy import Policy
from policy_cases import CPU, encoded, small_recipe
from tiny_pipelines import MODELS, write_pipeline

BLOCKS = {"sd3": 3, "flux": 4, "qwen_image": 2, "wan": 2}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: str(write_pipeline(name, root / name)) for name in MODELS} | {"sd3": "tiny"}


def policy_with(folders, name, compiled, **model):
    told = {**MODELS.get(name, {"adapter": "sd3"}), "path": folders[name], "dtype": "fp32", **model}
    return Policy.load(small_recipe(model=told, engine={"device": "cpu", "compile": compiled}), CPU)


@pytest.mark.parametrize("name", BLOCKS)
def test_all_blocks_are_compiled_and_nothing_else(folders, monkeypatch, name):
    found = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: found.append((module, options)))
    policy = policy_with(folders, name, True)
    assert len(found) == BLOCKS[name]
    assert all(options == {"dynamic": True} for _, options in found)
    blocks = {id(module) for module, _ in found}
    attention = [module for module in policy.transformer.modules() if hasattr(module, "to_q")]
    inside = {id(part) for module, _ in found for part in module.modules()}
    assert attention
    assert all(id(module) in inside for module in attention)
    assert len(blocks) == len(found)


@pytest.mark.long
@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_velocities_and_gradients_are_the_eager_ones(folders, fresh_dynamo, name):
    results = []
    for compiled in (False, True):
        policy = policy_with(folders, name, compiled, lora={"rank": 4, "alpha": 8}, gradient_checkpointing=True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.weights.trainable().values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        found = []
        for rows in (3, 2):
            x = torch.randn(rows, *policy.adapter.latent_shape, generator=generator)
            v = policy.velocity(x, torch.linspace(0.9, 0.2, rows), encoded(policy), torch.arange(rows)).v
            v.square().sum().backward()
            found.append(v.detach())
        gradients = {name: p.grad for name, p in policy.weights.trainable().items()}
        results.append((found, gradients))
    (eager, gradient), (compiled, other) = results
    for one, two in zip(eager, compiled, strict=True):
        assert (one - two).abs().max() <= 1e-5
    # a compiled block gives weights that nothing depends on (six of Qwen-Image's last block) a gradient of 0
    without = {name for name, each in gradient.items() if each is None}
    assert all(other[name] is None or not other[name].any() for name in without)
    have = [name for name in gradient if name not in without]
    one, two = (torch.cat([each[name].flatten() for name in have]) for each in (gradient, other))
    assert (one - two).norm() <= 1e-4 * one.norm()
