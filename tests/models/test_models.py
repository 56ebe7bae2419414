"""The adapters of all families against diffusers' own pipelines,
on tiny weights in the real folder layout (SD3: test_sd3.py).
"""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from flowgrove.errors import UserError
from flowgrove.evaluation import sample
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import listed_sigmas, recipe_sigmas
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, TEXTS, encoded, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS, NAMES, crossed

ODE = {"steps": 4, "shift": None, "group_size": 2, "shared_initial_noise": False, "window": {"strategy": "none"}}
PROMPTS = [*TEXTS, "", "a red circle " * 40]
LORA = {"rank": 4, "alpha": 8}
SIZES_AND_GUIDANCE = [(32, 32, 1.0), (32, 32, 3.5), (16, 48, 3.5), (16, 48, 0.0), (16, 48, 0.5), (16, 48, 2.0)]


def recipe_of(folders, name, **sections):
    model = {
        **MODELS[name],
        "path": str(folders[name]),
        "dtype": "fp32",
        "gradient_checkpointing": False,
        **sections.pop("model", {}),
    }
    return small_recipe(model={"lora": None, "guidance_scale": 1.0, **model}, **sections)


def policy_of(folders, name, **sections):
    return Policy.load(recipe_of(folders, name, **sections), CPU)


def diffusers_pipeline(folders, name):
    pipe = FAMILIES[name].pipeline.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def velocity_of(policy, name):
    """The velocity of two states of the first two prompts, with the family's source pictures."""
    prompts = encoded(policy, FAMILIES[name].prompts(TEXTS))
    return policy.velocity(states(policy, 2), torch.tensor([0.7, 0.3]), prompts, torch.tensor([0, 1])).v


def states(policy, count, seed=0):
    return torch.randn(count, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "height", "width", "guidance"), crossed(SIZES_AND_GUIDANCE, [(16, 48, 3.5)], True))
@torch.no_grad()
def test_ode_rollout_equals_the_diffusers_pipeline(folders, name, height, width, guidance):
    family, pipe = FAMILIES[name], diffusers_pipeline(folders, name)
    size = {"height": height * family.sides, "width": width * family.sides}
    recipe = recipe_of(folders, name, model={"guidance_scale": guidance, **size}, rollout=ODE)
    if family.flow_shift is not None:  # Euler over a table is what an ODE step of a rollout is
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=family.flow_shift)
        pipe.scheduler.set_timesteps(ODE["steps"])
        sigmas = replace(listed_sigmas(pipe.scheduler.sigmas.tolist()), boundary=recipe_sigmas(recipe).boundary)
    else:
        sigmas = recipe_sigmas(recipe)
    policy = Policy.load(recipe, CPU)
    assert policy.doubles == (guidance > 1 and not policy.adapter.embeds_guidance)
    plan = make_plan(recipe, 0, sigmas)
    prompts = family.prompts(PROMPTS)
    forest = rollout(
        plan, plan_coefficients(plan), policy, encoded(policy, prompts), runner_of(policy), seed=3, iteration=9
    )
    prompt = torch.arange(len(PROMPTS)).repeat_interleave(2)
    latents = philox_normal(
        (len(prompt), *policy.adapter.latent_shape),
        NoiseKey(3, 9, INITIAL_STEP, prompt, torch.arange(2).repeat(len(PROMPTS))),
    )
    repeated = [prompt for prompt in prompts for _ in range(2)]
    steps = {"num_inference_steps": ODE["steps"], "output_type": "latent"}
    drawn = family.draw(pipe, recipe.model, guidance, repeated, latents, **steps)
    expected = family.as_ours(pipe, recipe.model, drawn)
    assert (forest.leaves - expected).abs().max() <= 1e-4
    assert (forest.leaves[0] - forest.leaves[2]).abs().max() > 0.01, "the prompt matters"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_decoded_samples_equal_the_diffusers_pipeline(folders, name):
    family, recipe, pipe = FAMILIES[name], recipe_of(folders, name), diffusers_pipeline(folders, name)
    policy = Policy.load(recipe, CPU)
    prompts = family.prompts(TEXTS)
    latents = family.as_leaves(policy.encode(prompts).cond, states(policy, 3))
    pipe.scheduler.step = lambda v, t, x, return_dict: (x,)  # so the pipeline decodes what it was given
    steps = {"num_inference_steps": 2, "output_type": "pt"}
    expected = family.draw(pipe, recipe.model, 1.0, prompts, latents, **steps)
    decoded = policy.decode(latents)
    assert decoded.shape == expected.shape
    assert (decoded - expected).abs().max() <= 1e-5
    assert decoded.std() > 0.01


@pytest.mark.parametrize(("name", "guidance"), crossed([(1.0,), (3.5,)], [(3.5,)]))
@torch.no_grad()
def test_mixed_prompts_in_one_batch_equal_one_by_one(folders, name, guidance):
    policy = policy_of(folders, name, model={"guidance_scale": guidance})
    x, sigma = states(policy, len(PROMPTS)), torch.linspace(0.95, 0.1, len(PROMPTS))
    prompts = FAMILIES[name].prompts(PROMPTS)
    together = policy.velocity(x, sigma, encoded(policy, prompts), torch.arange(len(PROMPTS)))
    for row, text in enumerate(prompts):
        alone = policy.velocity(x[row : row + 1], sigma[row : row + 1], encoded(policy, [text]), torch.tensor([0]))
        assert (together.v[row] - alone.v[0]).abs().max() <= 1e-5
        if together.uncond is not None:
            assert (together.uncond[row] - alone.uncond[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_exactly_the_trainable_parameters(folders, name, lora):
    policy = policy_of(folders, name, model={"lora": lora})
    trainable = policy.weights.trainable()
    if lora:
        assert all("lora_" in parameter for parameter in trainable)
        adapted = {parameter.split(".lora_")[0] for parameter in trainable}
        blocks = [block for block in adapted if block.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
        assert blocks
        assert len(trainable) == 2 * len(adapted)
        for parameter in trainable.values():  # B starts at 0, which would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.05)
    else:
        assert len(trainable) == len(list(policy.transformer.parameters()))
    v = velocity_of(policy, name)
    v.square().sum().backward()
    silent = []
    for parameter, tensor in policy.transformer.named_parameters():
        if parameter not in trainable:
            assert tensor.grad is None, parameter
        elif tensor.grad is None or not tensor.grad.abs().max() > 0:
            silent.append(parameter)
    for parameter in silent:  # biases of keys shift all logits alike
        assert parameter.endswith("k.bias") or re.fullmatch(FAMILIES[name].silent, parameter), parameter
    others = [
        part
        for key, part in policy.adapter.pipe.components.items()
        if isinstance(part, torch.nn.Module) and not key.startswith("transformer")
    ]
    assert others
    assert all(p.grad is None and not p.requires_grad for part in others for p in part.parameters())


@pytest.mark.parametrize(("name", "dtype", "lora"), crossed([("fp32", None), ("bf16", LORA)], [("bf16", LORA)]))
@torch.no_grad()
def test_gradient_checkpointing_changes_no_gradient(folders, name, dtype, lora):
    gradients = []
    for checkpointing in ("none", "full", "selective"):
        policy = policy_of(folders, name, model={"gradient_checkpointing": checkpointing, "dtype": dtype, "lora": lora})
        trained = policy.weights.trainable()
        for number, parameter in enumerate(trained.values()):  # B of LoRA starts at 0, which would hide A's gradient
            if lora:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(number))
        policy.weights.refresh()
        with torch.enable_grad():
            v = velocity_of(policy, name)
            v.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_full_export_loads_in_diffusers_and_draws_the_same(folders, name, tmp_path):
    recipe = recipe_of(folders, name, rollout={"steps": 3, "shift": 3.0})
    policy = Policy.load(recipe, CPU)
    base = sample(Setup(recipe), policy, runner_of(policy), FAMILIES[name].prompts(TEXTS))
    for parameter in policy.weights.trainable().values():
        parameter.mul_(1.1)
    policy.adapter.save_pipeline(tmp_path / "export")
    FAMILIES[name].pipeline.from_pretrained(tmp_path / "export")
    loaded = Policy.load(
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "export")})}), CPU
    )
    tuned = sample(Setup(recipe), policy, runner_of(policy), FAMILIES[name].prompts(TEXTS))
    assert (tuned - sample(Setup(recipe), loaded, runner_of(loaded), FAMILIES[name].prompts(TEXTS))).abs().max() <= 1e-5
    assert (tuned - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_lora_export_loads_in_diffusers_and_draws_the_same(folders, name, tmp_path):
    policy, plain = policy_of(folders, name, model={"lora": LORA}), policy_of(folders, name)
    for parameter in policy.weights.trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    policy.adapter.save_lora(tmp_path / "lora")
    base = velocity_of(plain, name)
    FAMILIES[name].load_lora(plain.adapter.pipe, tmp_path / "lora")
    loaded, tuned = velocity_of(plain, name), velocity_of(policy, name)
    assert (loaded - tuned).abs().max() <= 1e-5
    assert (tuned - base).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bf16_trains_fp32_masters_over_frozen_bf16(folders, name):
    policy = policy_of(folders, name, model={"lora": LORA, "dtype": "bf16"})
    assert {p.dtype for p in policy.weights.trainable().values()} == {torch.float32}
    kept = policy.transformer._keep_in_fp32_modules or []
    frozen = {
        p.dtype
        for key, p in policy.transformer.named_parameters()
        if not p.requires_grad and not any(part in key for part in kept)
    }
    assert frozen == {torch.bfloat16}
    v = velocity_of(policy, name)
    assert v.dtype == torch.bfloat16
    assert policy.decode(states(policy, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("flux", {"height": 30}, "model.height is 30: write a multiple of 4"),
        ("flux", {"frames": 5}, "model.frames is 5, but flux draws pictures"),
        (
            "flux",
            {"adapter": "sd3"},
            "holds a FluxPipeline, which is not for model.adapter sd3: write model.adapter: flux",
        ),
        ("wan", {"frames": 6}, "model.frames is 6: write a multiple of 4 and one more, like 5"),
        ("wan", {"width": 40}, "model.width is 40: write a multiple of 16"),
        ("qwen_image", {"dtype": "fp64"}, "model.dtype is fp64"),
        ("wan", {"lora": {"rank": 2, "alpha": 2, "targets": ["nothing"]}}, "model.lora.targets"),
    ],
)
def test_unsuitable_settings_are_one_line_errors(folders, name, model, text):
    with pytest.raises(UserError, match=text) as caught:
        policy_of(folders, name, model=model)
    assert "\n" not in str(caught.value)
