"""FLOPs that are counted without a model against torch's own counter on the real one, and against a formula."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowgrove.models.blocks import blocks_of
from flowgrove.models.policy import Policy
from flowgrove.plan.flops import count_flops, counted
from policy_cases import CPU, encoded, small_recipe
from tiny_families import FAMILIES, MODELS, sampled

NAMES = sampled("sd3", "flux")
LONG = "a red circle " * 40
LORA = {"rank": 4, "alpha": 8}


def recipe_of(name, folders, **model):
    kind = {**MODELS.get(name, {"adapter": "sd3"}), "path": folders[name], "dtype": "fp32"}
    return small_recipe(model={**kind, **model})


def velocity(policy, prompts):
    """Of one state of the only prompt."""
    x = torch.randn(1, *policy.adapter.latent_shape, dtype=policy.state_dtype)
    return policy.velocity(x, torch.full((1,), 0.5), prompts, torch.zeros(1, dtype=torch.int64))


def decomposed(run):
    """Torch's own count of a real run whose attention is matrix products, which it knows on a CPU, too."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_forward_decoding_and_encoding_are_what_torch_counts_of_the_real_model(name, guidance, folders):
    recipe = recipe_of(name, folders, guidance_scale=guidance)
    (found,) = count_flops(recipe)
    policy = Policy.load(recipe, CPU)
    prompts, latents = encoded(policy, [LONG]), torch.randn(1, *policy.adapter.latent_shape)
    assert found.doubled == (2 if guidance > 1 and not policy.adapter.embeds_guidance else 1)
    forward = decomposed(lambda: velocity(policy, prompts))
    assert found.doubled * found.forward == pytest.approx(forward, rel=0.01)
    assert found.decode == pytest.approx(decomposed(lambda: policy.decode(latents)), rel=0.01)
    (long,) = prompts.texts
    encode = decomposed(lambda: policy.adapter.encode([long]))
    if name == "sd3" or (FAMILIES[name].cuts_tokens and not FAMILIES[name].sources):
        assert found.encode == pytest.approx(encode, rel=0.01)
    else:
        assert 0 < found.encode < encode


@pytest.mark.parametrize("name", sampled("sd3", "flux"))
def test_lora_layers_are_counted_with_and_without_a_gradient(name, folders):
    """Without one their products add in place, of which torch's own counter has no formula."""
    recipe = recipe_of(name, folders, lora={"rank": 8, "alpha": 8})
    (found,) = count_flops(recipe)
    policy = Policy.load(recipe, CPU)
    prompts = encoded(policy, [LONG])
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        trained = counted(lambda: velocity(policy, prompts)).get_total_flops()
    assert found.reference < found.doubled * found.forward == pytest.approx(trained, rel=0.001)


def of_blocks(policy, counter):
    """What the members of a transformer's lists of blocks take."""
    blocks = set(blocks_of(policy.transformer))
    names = {
        name for root in (policy.transformer, policy.adapter.running) for name, m in root.named_modules() if m in blocks
    }
    found = {name: flops for name, flops in counter.get_flop_counts().items() if name.partition(".")[2] in names}
    return sum(sum(flops.values()) for flops in found.values())


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_training_pass_is_what_runs(name, checkpointing, lora, folders):
    """Frozen weights have no gradient, and checkpoints run the blocks again, as far as a backward reads of them."""
    recipe = recipe_of(name, folders, lora=lora, gradient_checkpointing=checkpointing)
    (found,) = count_flops(recipe)
    policy = Policy.load(recipe, CPU)
    prompts = encoded(policy, [LONG])

    def train():
        v = velocity(policy, prompts).v
        v.backward(torch.ones_like(v))

    assert found.train + found.recomputed == pytest.approx(counted(train).get_total_flops(), rel=0.01)
    blocks = of_blocks(policy, counted(lambda: velocity(policy, prompts)))
    if checkpointing:
        assert 0.95 * blocks < found.recomputed <= blocks
    else:
        assert found.recomputed == 0
    assert found.reference == found.forward if lora is None else 0 < found.reference < found.forward


def test_frozen_weights_take_no_gradient(folders):
    full, lora = (count_flops(recipe_of("flux", folders, lora=lora))[0] for lora in (None, LORA))
    assert lora.forward > full.forward
    assert lora.backward < 0.8 * full.backward


def test_the_embedded_transformer_by_hand(folders):
    """Two floating-point operations for every weight and token, four for every pair of tokens and channel."""
    (found,) = count_flops(recipe_of("sd3", folders))
    width, picture, text = 96, 16, 19
    square = width * width
    embedders = picture * 2 * 2 * 4 * width + text * 64 * width + (256 + width + 64 + width) * width
    attention = 2 * (picture + text) ** 2 * width
    modulated = 2 * 6 * square + (picture + text) * (3 + 1 + 8) * square
    last = (6 + 2) * square + (picture + text) * 3 * square + picture * (1 + 8) * square
    head = 2 * square + picture * width * 2 * 2 * 4
    assert found.forward == 2 * (embedders + 2 * modulated + last + 3 * attention + head)
    # of each matrix product one for its weights and one for its input; attention's scores once more
    inputs_without_gradient = 2 * (picture * 2 * 2 * 4 + text * 64 + 256 + 64) * width
    products = found.forward - 2 * 3 * attention
    assert found.backward == pytest.approx(2 * products - inputs_without_gradient + 2.5 * 2 * 3 * attention, rel=0.001)


def test_bf16_and_float64_count_the_same(folders):
    found = [count_flops(recipe_of("sd3", folders, dtype=dtype))[0] for dtype in ("fp32", "bf16", "fp64")]
    assert found[0] == found[1] == found[2]


def test_every_size_is_counted(folders):
    recipe = small_recipe(
        model={"adapter": "sd3", "path": "tiny", "dtype": "fp32", "sizes": [[32, 32], [32, 16], [32, 32]]}
    )
    large, small, same = count_flops(recipe)
    assert (large.geometry.width, small.geometry.width) == (32, 16)
    assert large == same
    assert small.decode == pytest.approx(large.decode / 2, rel=0.02)
    assert small.forward < large.forward


def test_extrapolated_attention_leaves_out_attention_with_its_projections(folders):
    (found,) = count_flops(recipe_of("sd3", folders))
    width, picture, text = 96, 16, 19
    projections = 3 * (picture + text) * 3 * width**2 + (3 * picture + 2 * text) * width**2
    assert found.forward - found.extrapolated == 2 * (projections + 3 * 2 * (picture + text) ** 2 * width)
