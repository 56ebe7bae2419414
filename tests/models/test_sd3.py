"""The sd3 adapter against diffusers' own pipeline, LoRA and full fine-tuning, exports."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from flowgrove.errors import UserError
from flowgrove.evaluation import EVAL_ITERATION, sample
from flowgrove.models.folders import TINY
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, TEXTS, encoded, policy_of, runner_of, small_recipe

MODEL = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False}
LORA = {**MODEL, "lora": {"rank": 4, "alpha": 8}}
ODE = {"steps": 6, "shift": None, "group_size": 2, "shared_initial_noise": False, "window": {"strategy": "none"}}


SIZES_AND_GUIDANCE = [(32, 32, 1.0), (32, 32, 4.0), (16, 32, 4.0), (16, 32, 0.0), (16, 32, 0.5), (16, 32, 2.0)]


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("height", "width", "guidance"), SIZES_AND_GUIDANCE)
@torch.no_grad()
def test_ode_rollout_equals_the_diffusers_pipeline(pipe, height, width, guidance):
    texts = [*TEXTS, "", "a red circle " * 20]
    recipe = small_recipe(model={**MODEL, "guidance_scale": guidance, "height": height, "width": width}, rollout=ODE)
    policy = Policy.load(recipe, CPU)
    plan = make_plan(recipe, 0, recipe_sigmas(recipe))
    forest = rollout(
        plan, plan_coefficients(plan), policy, encoded(policy, texts), runner_of(policy), seed=3, iteration=9
    )
    prompt = torch.arange(len(texts)).repeat_interleave(2)
    latents = philox_normal(
        (2 * len(texts), *policy.adapter.latent_shape),
        NoiseKey(3, 9, INITIAL_STEP, prompt, torch.arange(2).repeat(len(texts))),
    )
    result = pipe(
        prompt=[text for text in texts for _ in range(2)], height=height, width=width, num_inference_steps=6,
        guidance_scale=guidance, latents=latents, output_type="latent",
        max_sequence_length=policy.adapter.geometry.prompt_tokens,
    )  # fmt: skip
    # guidance multiplies what the encoders' batches round
    assert (forest.leaves - result.images).abs().max() <= 3e-5 * (1 + guidance)
    assert (forest.leaves[0] - forest.leaves[2]).abs().max() > 0.1


@torch.no_grad()
def test_decoded_pictures_equal_the_diffusers_pipeline(pipe):
    policy = policy_of(dtype="fp32")
    latents = torch.randn(3, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = pipe.image_processor.postprocess(
        pipe.vae.decode(latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample,
        output_type="pt",
    )
    assert torch.allclose(policy.decode(latents), expected, atol=1e-5)


@torch.no_grad()
def test_mixed_prompts_in_one_batch_equal_one_by_one():
    policy = policy_of(dtype="fp32")
    x = torch.randn(3, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.5, 0.2])
    together = policy.velocity(x, sigma, encoded(policy), torch.arange(3)).v
    for row in range(3):
        alone = policy.velocity(
            x[row : row + 1], sigma[row : row + 1], encoded(policy, [TEXTS[row]]), torch.tensor([0])
        ).v
        assert (together[row] - alone[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_model_time_is_not_rounded_to_thousandths():
    """PRIOR_ART §3.17: two noise levels that an integer timestep would merge give different velocities."""
    policy = policy_of()
    x = torch.zeros(2, *policy.adapter.latent_shape, dtype=torch.float64)
    v = policy.velocity(
        x, torch.tensor([0.50001, 0.50049]), encoded(policy, TEXTS[:1]), torch.zeros(2, dtype=torch.int64)
    ).v
    assert (v[0] - v[1]).abs().max() > 1e-6


@pytest.mark.parametrize("model", [MODEL, LORA], ids=["full", "lora"])
def test_gradients_reach_exactly_the_trainable_parameters(model):
    policy = Policy.load(small_recipe(model=model), CPU)
    trainable = policy.weights.trainable()
    if model is LORA:
        assert trainable
        assert all("lora_" in name for name in trainable)
        for name, parameter in trainable.items():  # B starts at 0, which would hide A's gradient
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
    else:
        assert len(trainable) == len(list(policy.transformer.parameters()))
    x = torch.randn(2, *policy.adapter.latent_shape)
    v = policy.velocity(x, torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v
    v.square().sum().backward()
    for name, parameter in policy.transformer.named_parameters():
        if name in trainable:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
            # the last block drops its text stream, so the text's queries there have no effect
            assert (parameter.grad.abs().max() > 0) != name.startswith(
                ("transformer_blocks.2.attn.add_q_proj", "transformer_blocks.2.attn.norm_added_q")
            ), name
        else:
            assert parameter.grad is None, name
    frozen = [policy.adapter.pipe.vae, policy.adapter.pipe.text_encoder, policy.adapter.pipe.text_encoder_3]
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())


@torch.no_grad()
def test_fresh_lora_leaves_the_model_as_it_was_and_is_seeded():
    policies = [Policy.load(small_recipe(model=LORA, run={"seed": seed}), CPU) for seed in (1, 1, 2)]
    x, sigma, prompt = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.3]), torch.tensor([0, 1])
    base = policy_of(dtype="fp32")
    expected = base.velocity(x, sigma, encoded(base), prompt).v
    assert torch.allclose(policies[0].velocity(x, sigma, encoded(policies[0]), prompt).v, expected, atol=1e-6)
    first, same, other = (torch.cat([p.flatten() for p in policy.weights.trainable().values()]) for policy in policies)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_bf16_keeps_fp32_master_weights_and_stores_frozen_weights_in_bf16():
    full = Policy.load(small_recipe(model={**MODEL, "dtype": "bf16"}), CPU)
    assert {p.dtype for p in full.weights.trainable().values()} == {torch.float32}
    lora = Policy.load(small_recipe(model={**LORA, "dtype": "bf16"}), CPU)
    assert {p.dtype for p in lora.weights.trainable().values()} == {torch.float32}
    assert {p.dtype for p in lora.transformer.parameters() if not p.requires_grad} == {torch.bfloat16}
    for policy in (full, lora):
        v = policy.velocity(torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v
        assert v.dtype == torch.bfloat16


@torch.no_grad()
def test_full_export_loads_in_diffusers_and_draws_the_same(tmp_path):
    policy = Policy.load(small_recipe(model=MODEL), CPU)
    for parameter in policy.weights.trainable().values():
        parameter.mul_(1.05)
    policy.adapter.save_pipeline(tmp_path / "export")
    loaded = Policy.load(small_recipe(model={**MODEL, "path": str(tmp_path / "export")}), CPU)
    _same_velocity(policy, loaded)


@torch.no_grad()
def test_lora_export_loads_in_diffusers_and_draws_the_same(tmp_path, pipe):
    policy = Policy.load(small_recipe(model=LORA), CPU)
    for parameter in policy.weights.trainable().values():
        torch.nn.init.normal_(parameter, std=0.05)
    policy.adapter.save_lora(tmp_path / "lora")
    loaded = policy_of.__wrapped__(dtype="fp32")
    loaded.adapter.pipe.load_lora_weights(tmp_path / "lora")
    _same_velocity(policy, loaded)
    base = policy_of(dtype="fp32")
    x, sigma, prompt = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.3]), torch.tensor([0, 1])
    assert (
        base.velocity(x, sigma, encoded(base), prompt).v - policy.velocity(x, sigma, encoded(policy), prompt).v
    ).abs().max() > 1e-2


def _same_velocity(one: Policy, other: Policy) -> None:
    x, sigma, prompt = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.3]), torch.tensor([0, 1])
    first, second = (p.velocity(x, sigma, encoded(p), prompt).v for p in (one, other))
    assert (first - second).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.5])
@torch.no_grad()
def test_evaluation_guides_above_1_only(scale):
    guided = Policy.load(small_recipe(model={**MODEL, "guidance_scale": 3.0}), CPU)
    plain = sample(Setup(small_recipe(model=MODEL)), policy_of(dtype="fp32"), runner_of(policy_of(dtype="fp32")), TEXTS)
    evaluated = sample(
        Setup(small_recipe(model={**MODEL, "guidance_scale": 3.0}, run={"eval": {"guidance_scale": scale}})),
        guided,
        runner_of(guided),
        TEXTS,
    )
    assert torch.equal(evaluated, plain)


@torch.no_grad()
def test_samples_are_fixed_by_seed_and_prompt_number():
    policy, recipe = policy_of(dtype="fp32"), small_recipe(model=MODEL, run={"eval": {"samples": 2}})
    all_at_once = sample(Setup(recipe), policy, runner_of(policy), TEXTS)
    later = sample(Setup(recipe), policy, runner_of(policy), TEXTS[1:], first_prompt=1)
    assert len(all_at_once) == 2 * len(TEXTS)
    assert torch.allclose(all_at_once[2:], later, atol=1e-5)
    assert not torch.allclose(all_at_once[0], all_at_once[1], atol=1e-2)
    assert EVAL_ITERATION == 2**32 - 1


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({**MODEL, "path": "nowhere"}, "model.path nowhere holds no model_index.json"),
        ({**MODEL, "height": 33}, "model.height is 33: write a multiple of 8 up to 64"),
        ({**MODEL, "lora": {"rank": 4, "alpha": 4, "targets": ["nothing"]}}, "model.lora.targets"),
    ],
)
def test_unsuitable_models_are_one_line_errors(model, text):
    with pytest.raises(UserError, match=text) as caught:
        Policy.load(small_recipe(model=model), CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [MODEL, LORA], ids=["full", "lora"])
@torch.no_grad()
def test_the_reference_model_stays_as_it_was_while_the_policy_moves(model):
    policy = Policy.load(small_recipe(model={**model, "guidance_scale": 2.0}, update={"kl_weight": 0.1}), CPU)
    x, sigma, prompt = torch.randn(2, 4, 8, 8), torch.tensor([0.7, 0.3]), torch.tensor([0, 1])
    prompts = encoded(policy)
    for parameter in policy.weights.trainable().values():
        parameter.add_(0.02 * torch.randn_like(parameter))
    base = policy_of(dtype="fp32", guidance=2.0)
    expected = base.velocity(x, sigma, encoded(base), prompt)
    with policy.reference() as untrained:
        reference = untrained.velocity(x, sigma, prompts, prompt)
    moved = policy.velocity(x, sigma, prompts, prompt)
    assert torch.allclose(reference.v, expected.v, atol=1e-6)
    assert torch.allclose(reference.uncond, expected.uncond, atol=1e-6)
    assert (moved.v - expected.v).abs().max() > 1e-2, "the policy is switched back on"
