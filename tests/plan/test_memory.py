"""Predicted memory against what the allocator really hands out:
PyTorch's profiler adds it up for the model itself, with real weights.
"""

import json

import pytest
import torch

from engine_cases import refuse, succeed
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.plan.memory import MemoryModel, predict_memory
from flowgrove.plan.planner import make_plan
from flowgrove.rewards import scoring
from flowgrove.rewards.registry import Rewards
from flowgrove.setup import Setup
from flowgrove.update.passes import _KeptVelocities
from flowgrove.update.updater import Updater
from memory_cases import allocated
from policy_cases import CPU, TEXTS, encoded, runner_of, small_recipe
from tiny_families import MODELS, sampled
from update_cases import policy_with_reference

LORA = {"rank": 4, "alpha": 8}
FLUX_DEV = {
    "adapter": "flux",
    "path": "black-forest-labs/FLUX.1-dev",
    "dtype": "bf16",
    "height": 720,
    "width": 720,
    "guidance_scale": 3.5,
}


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_guidance_of_at_most_1_costs_nothing(folders, scale):
    recipes = [
        small_recipe(model={"adapter": "sd3", "path": "tiny", "guidance_scale": guidance}) for guidance in (scale, 1.0)
    ]
    predictions = [predict_memory(recipe, make_plan(recipe, 0), "cpu") for recipe in recipes]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize(
    ("lora", "checkpointing", "guidance", "dtype"),
    [
        pytest.param(None, False, 1.0, "fp32", marks=pytest.mark.long),
        (None, True, 1.0, "fp32"),
        pytest.param(LORA, False, 4.0, "fp32", marks=pytest.mark.long),
        (LORA, True, 1.0, "bf16"),
        pytest.param(None, "selective", 1.0, "fp32", marks=pytest.mark.long),
        (LORA, "selective", 1.0, "bf16"),
    ],
)
@pytest.mark.parametrize("name", sampled("sd3", "wan"))
def test_prediction_of_a_training_pass_holds(folders, name, lora, checkpointing, guidance, dtype):
    model = {
        **MODELS.get(name, {"adapter": "sd3"}),
        "path": folders[name],
        "dtype": dtype,
        "lora": lora,
        "gradient_checkpointing": checkpointing,
    }
    recipe = small_recipe(
        model={**model, "guidance_scale": guidance}, data={"prompts": "unused.txt", "prompts_per_iteration": 24}
    )
    policy = Policy.load(recipe, CPU)
    plan = make_plan(recipe, 0)
    found = predict_memory(recipe, plan, "cpu")
    texts = ["a red circle " * 40] * 24
    prompts = encoded(policy, texts)
    rows = found.rows // (2 if policy.doubles else 1)
    x = torch.randn(rows, *policy.adapter.latent_shape)
    sigma = torch.full((rows,), 0.5)
    prompt_of = torch.zeros(rows, dtype=torch.int64)
    for parameter in policy.weights.trainable().values():
        parameter.grad = torch.zeros_like(parameter)

    def train():
        v, uncond, _ = policy.velocity(x, sigma, prompts, prompt_of)
        torch.autograd.backward(
            [v] if uncond is None else [v, uncond], [torch.ones_like(v)] * (1 if uncond is None else 2)
        )

    train()
    measured = allocated(train)
    assert found.stages["training"] == pytest.approx(measured, rel=0.15)
    weights = sum(p.numel() * p.element_size() for p in policy.transformer.parameters())
    assert found.resident["transformer"] == pytest.approx(weights, rel=0.05)
    assert found.resident["gradients"] == sum(p.numel() * 4 for p in policy.weights.trainable().values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_all_weights_hide_nothing_of_a_pass(folders, dtype):
    """A pass of one row holds less than the gradients of all weights take."""
    model = {**MODELS["flux"], "path": folders["flux"], "dtype": dtype, "gradient_checkpointing": True}
    recipe = small_recipe(model=model, engine={"device": "cpu", "token_budget": 1})
    policy = Policy.load(recipe, CPU)
    found = predict_memory(recipe, make_plan(recipe, 0), "cpu")
    assert found.rows == 1
    prompts = encoded(policy, ["a red circle"])
    for weight in policy.weights.trainable().values():
        weight.grad = torch.zeros_like(weight)

    def train():
        v = policy.velocity(
            torch.randn(1, *policy.adapter.latent_shape), torch.full((1,), 0.5), prompts, torch.tensor([0])
        ).v
        v.backward(torch.ones_like(v))

    train()
    # what kernels of the CPU hold for themselves counts in so small a pass
    assert found.stages["training"] == pytest.approx(allocated(train), rel=0.25)
    assert found.stages["training"] < found.resident["gradients"]


@pytest.mark.parametrize(
    ("reward", "together"),
    [({"name": "jpeg_size"}, 2), ({"name": "http", "url": "http://localhost:1"}, 2),
     ({"name": "http", "url": "http://localhost:1", "group": "true"}, 6), ({"name": "diversity"}, 6)],
)  # fmt: skip
def test_pictures_of_a_prompt_that_are_scored_together_are_all_counted(reward, together, monkeypatch):
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "fp32"},
        data={"prompts": "unused.txt", "prompts_per_iteration": 8},
        rollout={"steps": 4, "group_size": 6},
        reward=[{"name": "shapes"}, reward],
    )
    model = MemoryModel(recipe, make_plan(recipe, 0), "cpu")
    pixels = model.geometry.pixels

    def decoding(at_once):
        monkeypatch.setattr(scoring, "PIXELS_AT_ONCE", at_once * pixels)
        with model.running():
            return model._decoding(1)

    few, two, many = (decoding(at_once) for at_once in (1, 2, 13))
    picture = 2 * 3 * 4 * pixels  # three colours in fp32, and what scoring takes beside them
    assert two - few == (picture if together == 2 else 0)
    assert many - two == picture * ((13 if together == 2 else 12) - together)  # groups of 6 are never cut


@pytest.mark.parametrize("keeps", [False, True])
def test_prediction_of_an_iteration_holds(keeps):
    """Rollout, decoding, credit and update together;
    with the rollout's graphs, as much more as they are said to hold.
    """
    tree = {
        "steps": 10,
        "group_size": 16,
        "tree": {"splits": [0, 2, 4, 6], "fanout": 2},
        "window": {"strategy": "frozen", "size": 3},
    }
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False},
        data={"prompts": "unused.txt", "prompts_per_iteration": 8},
        rollout=tree,
        reward=[{"name": "jpeg_size"}],
        update={"updates_per_iteration": 1},
        engine={"device": "cpu", "reuse_rollout_graph": keeps},
    )
    policy, plan = Policy.load(recipe, CPU), make_plan(recipe, 0)
    stages = Stages(Setup(recipe), policy, Updater(recipe, policy, runner_of(policy, recipe)), Rewards(recipe, CPU))
    texts = [f"a red circle number {number}" for number in range(8)]
    found = predict_memory(recipe, plan, "cpu")
    stages.run(texts, 0)  # the optimiser's state and the texts' embeddings stay
    measured = allocated(lambda: stages.run(texts, 1))
    expected = (
        max(found.stages.values()) + found.resident["gradients"] + found.resident["forest"] + found.resident["prompts"]
    )
    if keeps:
        expected += found.graph * 8 * plan.counts.train_passes
    assert measured == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("updates", "every", "iteration", "kept"), [(2, None, 1, True), (1, 2, 0, True), (1, 2, 1, False), (1, 2, 2, True)]
)
def test_reference_velocities_are_predicted_as_they_are_kept(updates, every, iteration, kept, monkeypatch):
    """Of levels of 1, 1, 4, 4, 4, 4 nodes the second and the third begin a trained step."""
    held = []

    class Held(_KeptVelocities):
        def __init__(self, forest):
            super().__init__(forest)
            held.append(self)

    monkeypatch.setattr("flowgrove.update.passes._KeptVelocities", Held)
    recipe = small_recipe(
        update={"kl_weight": 0.1, "updates_per_iteration": updates}, run={"gradient_noise_every": every}
    )
    policy, setup, rewards = policy_with_reference(recipe, 1.0), Setup(recipe), Rewards(recipe, CPU)
    draw = torch.Generator().manual_seed(0)  # no edge without an advantage
    monkeypatch.setattr(rewards, "scorers", {"shapes": lambda pictures, texts: torch.rand(len(texts), generator=draw)})
    Stages(setup, policy, Updater(recipe, policy, runner_of(policy, recipe)), rewards).run(TEXTS, iteration)
    rows = len(TEXTS) * (1 + 4)
    assert [one.known.tolist() for one in held] == [[True] * rows] * kept
    found = MemoryModel(recipe, setup.plan(iteration), "cpu").resident(4096)
    assert found.get("reference velocities", 0) == sum(one.of.nbytes for one in held)


# autocast runs their norms in fp32 on a GPU; RMSNorms that diffusers writes out are in fp32 everywhere
@pytest.mark.parametrize("name", sampled("flux", names=("sd3", "flux", "qwen_image", "wan")))
@pytest.mark.parametrize("checkpointing", [True, False])
def test_norms_in_fp32_as_a_gpu_computes_them_need_more(folders, name, checkpointing):
    model = {
        **MODELS.get(name, {"adapter": "sd3"}),
        "path": folders[name],
        "dtype": "bf16",
        "lora": LORA,
        "gradient_checkpointing": checkpointing,
    }
    recipe = small_recipe(model=model, data={"prompts": "unused.txt", "prompts_per_iteration": 2})
    plan = make_plan(recipe, 0)
    cpu, cuda = (predict_memory(recipe, plan, device).stages["training"] for device in ("cpu", "cuda"))
    assert cpu < cuda < 2 * cpu


@pytest.mark.long
def test_checkpointing_and_lora_need_less_and_kl_of_full_training_more():
    def predicted(**changes):
        sections = {
            "model": {
                **FLUX_DEV,
                "height": 256,
                "width": 256,
                "gradient_checkpointing": True,
                "lora": {"rank": 32, "alpha": 64},
            }
        }
        for section, keys in changes.items():
            sections[section] = {**sections.get(section, {}), **keys}
        recipe = small_recipe(**sections)
        return predict_memory(recipe, make_plan(recipe, 0), "cuda")

    lora = predicted()
    without = predicted(model={"gradient_checkpointing": False})
    assert without.stages["training"] > 5 * lora.stages["training"]
    assert lora.resident["transformer"] == pytest.approx(11.9e9 * 2, rel=0.02)
    full = predicted(model={"lora": None}, update={"kl_weight": 0.1, "ema_decay": 0.9})
    assert full.resident["transformer"] == pytest.approx(11.9e9 * 2, rel=0.02)
    assert full.resident["master weights"] == pytest.approx(11.9e9 * 4, rel=0.02)
    assert full.resident["optimiser"] == pytest.approx(11.9e9 * 8, rel=0.02)
    assert full.resident["untouched copy"] == pytest.approx(11.9e9 * 2, rel=0.02)
    assert full.resident["averaged weights"] == full.resident["gradients"] == pytest.approx(11.9e9 * 4, rel=0.02)
    assert full.peak > 285e9


def test_plan_prints_it_and_keeps_json_alone_on_stdout():
    told = succeed("plan", "recipes/quickstart.yaml", "--memory")
    assert "predicted memory of one cpu device" in told.stdout
    assert "peak" in told.stdout
    assert "σ: rollout.shift 1" in told.stdout
    told = succeed("plan", "recipes/quickstart.yaml", "--memory", "--json")
    assert json.loads(told.stdout)["counts"]
    assert "predicted memory" in told.stderr


def test_an_unknown_model_that_is_not_here_is_refused():
    text = refuse("plan", "recipes/quickstart.yaml", "--memory", "--set", "model.path=nobody/nothing")
    assert "hf download nobody/nothing" in text
