"""engine.compile: every block of every family is compiled, and computes what it computed."""

import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowgrove.errors import UserError
from flowgrove.models import compiling
from flowgrove.models.compiled_passes import compile_ahead
from flowgrove.models.compiling import compile_blocks, eager_blocks
from flowgrove.models.policy import Policy
from policy_cases import CPU, encoded, small_recipe
from tiny_families import FAMILIES, MODELS, sampled

BLOCKS = {name: family.blocks for name, family in FAMILIES.items()} | {"sd3": 3}


@pytest.fixture(autouse=True)
def cache_of_the_tests(monkeypatch, kept):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))


@pytest.fixture
def graphs(monkeypatch, fresh_dynamo):
    """What torch.compile hands to its backend, which runs it as it is."""
    found = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: found.append(graph) or graph.forward)
    return found


def policy_with(folders, name, compiled, **model):
    told = {**MODELS.get(name, {"adapter": "sd3"}), "path": folders[name], "dtype": "fp32", **model}
    return Policy.load(small_recipe(model=told, engine={"device": "cpu", "compile": compiled}), CPU)


@pytest.mark.parametrize("name", sampled("sd3", "flux", "qwen_image", "wan"))
def test_all_blocks_are_compiled_and_nothing_else(folders, monkeypatch, name):
    found = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: found.append((module, options)))
    policy = policy_with(folders, name, True)
    assert len(found) == BLOCKS[name]
    assert all(options == {"dynamic": True, "backend": "inductor", "mode": None} for _, options in found)
    blocks = {id(module) for module, _ in found}
    attention = [
        module
        for place, module in policy.transformer.named_modules()
        if hasattr(module, "to_q") and not place.startswith("context_embedder")  # HunyuanVideo's reads texts alone
    ]
    inside = {id(part) for module, _ in found for part in module.modules()}
    assert attention
    assert all(id(module) in inside for module in attention)
    assert len(blocks) == len(found)


def test_the_reference_copy_is_compiled_too(folders, monkeypatch):
    found = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: found.append((module, options)))
    told = {"adapter": "sd3", "path": "tiny", "dtype": "fp32"}
    engine = {"device": "cpu", "compile": "max-autotune-no-cudagraphs"}
    Policy.load(small_recipe(model=told, engine=engine, update={"kl_weight": 0.1}), CPU)
    assert len(found) == 2 * BLOCKS["sd3"]
    assert {options["mode"] for _, options in found} == {"max-autotune-no-cudagraphs"}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_with_cuda_graphs_of_their_own_are_refused(mode):
    with pytest.raises(UserError, match=f"engine.compile.*{mode}.*engine.cuda_graphs: true"):
        small_recipe(engine={"device": "cpu", "compile": mode})


@pytest.mark.long
@torch.no_grad()
def test_blocks_that_are_first_counted_are_compiled_afterwards(folders, graphs):
    """A block that torch.compile met under a dispatch mode would stay eager for good."""
    policy = policy_with(folders, "sd3", True)
    x, prompts = torch.randn(2, *policy.adapter.latent_shape), encoded(policy)
    with eager_blocks(policy.transformer), FlopCounterMode(display=False) as counter:
        policy.velocity(x, torch.tensor([0.5, 0.2]), prompts, torch.arange(2))
    assert counter.get_total_flops() > 0
    assert graphs == []
    policy.velocity(x, torch.tensor([0.5, 0.2]), prompts, torch.arange(2))
    assert len(graphs) == BLOCKS["sd3"]


@pytest.mark.long
@torch.no_grad()
def test_lengths_that_are_equal_once_may_part_later(folders, graphs):
    """Rows as many as tokens; torch would take both for the same number."""
    policy = policy_with(folders, "flux", True)
    prompts = encoded(policy)
    tokens = policy.adapter.latent_shape[0]
    for number, rows in enumerate((tokens, tokens + 1, 3)):
        x = torch.randn(rows, *policy.adapter.latent_shape)
        policy.velocity(x, torch.full((rows,), 0.5), prompts, torch.zeros(rows, dtype=torch.int64))
        if number == 0:
            first = len(graphs)
    assert len(graphs) == first > 0


@pytest.mark.long
@pytest.mark.parametrize("ahead", [True, False])
def test_all_graphs_are_compiled_ahead_and_leave_no_gradients(folders, graphs, ahead):
    policy = policy_with(folders, "sd3", True, lora={"rank": 4, "alpha": 8})
    prompts = encoded(policy)

    def run(rows, grad):
        x = torch.randn(rows, *policy.adapter.latent_shape)
        with torch.set_grad_enabled(grad):
            policy.velocity(x, torch.full((rows,), 0.5), prompts, torch.zeros(rows, dtype=torch.int64))

    if ahead:
        compile_ahead(policy, small_recipe(), 8)
        assert all(parameter.grad is None for parameter in policy.weights.trainable().values())
    else:
        run(3, False)
    compiled = len(graphs)
    for rows, grad in ((1, False), (4, True), (5, False), (1, True)):
        run(rows, grad)
    assert compiled == (12 if ahead else 3)
    assert len(graphs) == 12


@pytest.mark.parametrize("set_", [None, "/somewhere/else"])
def test_what_is_compiled_is_kept_where_the_user_says_or_in_their_cache_folder(monkeypatch, tmp_path, set_):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if set_ is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", set_)
    compile_blocks(nn.Module())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (set_ or str(tmp_path / "flowgrove" / "compiled"))


@pytest.mark.parametrize("machines", [1, 2])
def test_several_machines_share_no_folder_of_what_is_compiled(monkeypatch, tmp_path, machines):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", str(2 * machines))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compile_blocks(nn.Module())
    assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) == (machines == 1)
    assert (tmp_path / "flowgrove").exists() == (machines == 1)


def test_a_cache_folder_that_cannot_be_made_is_no_error(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compile_blocks(nn.Module())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


WRITTEN = ("sd3", "flux", "qwen_image", "wan")  # what inductor writes of a block takes half a minute to compile


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3", *FAMILIES])
def test_compiled_velocities_and_gradients_are_the_eager_ones(folders, fresh_dynamo, monkeypatch, name):
    """Of the other families all that torch takes from their code, without what inductor makes of it."""
    if name not in WRITTEN:
        monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
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
