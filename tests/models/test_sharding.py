"""Weights that FSDP2 divides give the velocities and gradients of whole ones: here in a world of one rank, where all of
its machinery runs and nothing is sent. tests/engine/test_ranks.py has several.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flowgrove.credit import assign_credit
from flowgrove.errors import UserError
from flowgrove.models.experts import expert_of
from flowgrove.models.policy import Policy
from flowgrove.passes.out_of_memory import PassTooLargeError
from flowgrove.ranks import Ranks
from flowgrove.rollout.loop import rollout
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import MODELS, sampled

KINDS = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "lora, checkpointed": {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True},
}
ROUNDING = {"bf16": 1e-2, "fp32": 1e-5}


@pytest.fixture
def ranks():
    """A world of one whose weights are divided all the same."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)))
    finally:
        dist.destroy_process_group()


def passes(policy):
    """Velocities of two training passes with a pass for nothing between them, and the gradients they add up to."""
    generator, prompts, found = torch.Generator().manual_seed(0), encoded(policy), []
    policy.weights.meet()
    for turn in range(2):
        x = torch.randn(3, *policy.adapter.latent_shape, generator=generator, dtype=policy.state_dtype)
        v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.2]), prompts, torch.tensor([0, 1, 2])).v
        v.backward(torch.randn(v.shape, generator=generator, dtype=policy.state_dtype).to(v.dtype))
        found.append(v.detach())
        if turn == 0:
            policy.idle_pass(backward=True)
    policy.weights.take_gradients()
    return found, {name: p.grad for name, p in policy.weights.trainable().items()}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sampled("sd3", "flux"))
def test_every_family_computes_what_it_does_with_whole_weights(family, kind, dtype, folders, ranks):
    model = {"adapter": "sd3", **MODELS.get(family, {}), "path": folders[family]}
    model = {**model, "dtype": dtype, "gradient_checkpointing": False, **KINDS[kind]}
    recipe = small_recipe(model=model, engine={"distributed": "fsdp2"})
    whole, divided = Policy.load(recipe, CPU), Policy.load(recipe, CPU, (), ranks)
    assert divided.weights.sharded
    assert list(whole.weights.trainable()) == list(divided.weights.trainable())
    with torch.no_grad():
        for policy in (whole, divided):
            for name, parameter in policy.weights.trainable().items():
                if "lora_B" in name:
                    parameter.fill_(0.03)
            policy.weights.refresh()
    for reshards in (True, False):
        divided.weights.reshard(reshards)
        (expected, plain), (found, gradients) = passes(whole), passes(divided)
        assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
        for name, gradient in plain.items():
            assert (gradient is None) == (gradients[name] is None), name
            if gradient is not None:  # what many blocks leave for one layer is added up in another order
                assert float((gradient - gradients[name]).norm()) <= ROUNDING[dtype] * float(gradient.norm()), name
        for policy in (whole, divided):
            policy.weights.drop_gradients()
            policy.weights.refresh()


@pytest.mark.parametrize("trained", ["both", "low"])
def test_an_expert_whose_passes_run_needs_nothing_of_the_other(folders, ranks, trained):
    model = {**MODELS["wan_a14b"], "path": folders["wan_a14b"], "dtype": "fp32", "trained_experts": trained}
    recipe = small_recipe(model={**model, "gradient_checkpointing": True}, engine={"distributed": "fsdp2"})
    whole, divided = Policy.load(recipe, CPU), Policy.load(recipe, CPU, (), ranks)
    divided.weights.reshard(True)
    of_low = {name for name in whole.weights.trainable() if expert_of(name)[0] == "low"}
    (expected, plain), (found, gradients) = (passes(policy.of_expert("low")) for policy in (whole, divided))
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert {name for name, gradient in gradients.items() if gradient is not None} == of_low
    for name in of_low:
        assert float((plain[name] - gradients[name]).norm()) <= 1e-5 * float(plain[name].norm()), name
    with torch.no_grad(), divided.weights.gathered():
        x, sigma, prompts = torch.ones(1, *whole.adapter.latent_shape), torch.tensor([0.9]), torch.tensor([0])
        v, its = (p.of_expert("high").velocity(x, sigma, encoded(p), prompts).v for p in (whole, divided))
    # some CPUs add in another order where weights lie elsewhere
    assert float((v - its).norm()) <= 1e-6 * float(v.norm())


def test_what_is_small_stays_whole(ranks):
    recipe = small_recipe(model={"dtype": "bf16"}, engine={"distributed": "fsdp2"})
    weights = Policy.load(recipe, CPU, (), ranks).weights
    whole = set(weights.trainable()) - set(weights.pieces)
    assert whole
    assert all("norm" in name for name in whole), whole
    assert all(tensor.dtype == torch.float32 for tensor in weights.trainable().values())
    lora = Policy.load(
        small_recipe(model={"dtype": "bf16", "lora": {"rank": 2, "alpha": 2}}, engine={"distributed": "fsdp2"}),
        CPU, (), ranks,
    ).weights  # fmt: skip
    assert lora.sharded
    assert not lora.pieces


def test_weights_and_averages_change_places(ranks):
    """Passes read what the masters hold, also after rows were copied under FSDP's hands."""
    policy = Policy.load(small_recipe(engine={"distributed": "fsdp2"}), CPU, (), ranks)
    weights, x = policy.weights, torch.ones(1, *policy.adapter.latent_shape, dtype=policy.state_dtype)

    def velocity():
        with torch.no_grad(), weights.gathered():
            return policy.velocity(x, torch.tensor([0.5]), encoded(policy), torch.tensor([0])).v

    before, other = velocity(), {name: 0.5 * p.detach() for name, p in weights.trainable().items()}
    weights.exchange(other)
    between = velocity()
    assert not torch.equal(between, before)
    weights.exchange(other)
    assert torch.equal(velocity(), before)
    weights.load({name: 0.5 * p.detach() for name, p in weights.trainable().items()})
    assert torch.equal(velocity(), between)


def test_the_reference_model_stays_as_it_was(ranks):
    recipe = small_recipe(update={"kl_weight": 0.1}, engine={"distributed": "fsdp2"})
    policy = Policy.load(recipe, CPU, (), ranks)
    weights, x = policy.weights, torch.ones(1, *policy.adapter.latent_shape, dtype=policy.state_dtype)

    def velocities():
        with torch.no_grad(), weights.gathered(reference=True), policy.reference() as reference:
            each = (policy, reference)
            return [one.velocity(x, torch.tensor([0.5]), encoded(policy), torch.tensor([0])).v for one in each]

    before = velocities()
    assert torch.equal(*before)
    with torch.no_grad():
        for parameter in weights.trainable().values():
            parameter.mul_(0.5)
    weights.refresh()
    tuned, reference = velocities()
    assert torch.equal(reference, before[1])
    assert not torch.equal(tuned, reference)


def test_what_is_halved_is_the_training_pass_that_did_not_fit(ranks, monkeypatch):
    """The rollout's passes are larger: half of those would be the pass that failed."""
    recipe = small_recipe(engine={"distributed": "fsdp2"}, update={"updates_per_iteration": 4})
    policy = Policy.load(recipe, CPU, (), ranks)
    updater, row = Updater(recipe, policy, runner_of(policy, recipe), ranks), policy.adapter.geometry.tokens
    inner, rolled, trained = policy.adapter.velocity, [], []

    def velocity(x, *rest):
        (trained if torch.is_grad_enabled() else rolled).append(len(x))
        if torch.is_grad_enabled() and len(x) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return inner(x, *rest)

    monkeypatch.setattr(policy.adapter, "velocity", velocity)
    prompts, (plan, rows) = encoded(policy), plan_and_coefficients(recipe)
    with policy.weights.gathered():
        forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0)
    scores = np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1))
    parts = [Rolled(policy, forest, prompts, assign_credit(plan, recipe.credit, scores, [1.0]), rows)]
    with pytest.raises(PassTooLargeError, match="in a training pass of up to 4096 tokens") as raised:
        updater.run(parts)
    (failed,) = trained
    assert failed <= max(rolled) // 2
    assert raised.value.tokens == failed * row // 2
    runner_of(policy).budget.resize(raised.value.tokens)  # as the next start does
    updater.run(parts)
    assert max(trained[1:]) <= failed // 2


def test_quantised_weights_are_not_divided(ranks, monkeypatch):
    monkeypatch.setattr("flowgrove.models.loading.is_quantised", lambda place: True)
    with pytest.raises(UserError, match=r"is stored quantised.*write ddp"):
        Policy.load(small_recipe(engine={"distributed": "fsdp2"}), CPU, (), ranks)


@pytest.mark.parametrize(
    ("section", "keys", "instead"),
    [
        ("engine", {"reuse_rollout_graph": True}, "write auto, or ddp"),
        ("engine", {"cuda_graphs": True}, "write false, or ddp"),
        ("update", {"optimizer": "adamw_8bit"}, "write adamw, or ddp"),
        ("update", {"optimizer": "apex_fused_adam"}, "write adamw, or ddp"),
        ("engine", {"distributed": "ddp", "shard_degree": 2}, "write fsdp2, or remove it"),
    ],
)
def test_what_does_not_go_with_divided_weights_is_refused(section, keys, instead):
    from flowgrove.recipe.checks import check_meaning

    sections = {"engine": {"distributed": "fsdp2"}}
    sections[section] = {**sections.get(section, {}), **keys}
    with pytest.raises(UserError, match=instead):
        check_meaning(small_recipe(**sections))
