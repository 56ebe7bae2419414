"""Linear layers in 8 bits: which they are, what they compute, and how they follow weights that train."""

from pathlib import Path

import pytest
import torch
from torch import nn

import flowgrove.models
from flowgrove.errors import UserError
from flowgrove.models import quantised
from flowgrove.models.blocks import blocks_of
from flowgrove.models.parts import model_from_config
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import (
    QuantisedCopy,
    QuantisedLinear,
    _fp8_product,
    _int8_product,
    check_precision,
    has_fp8,
    quantisable,
    quantised_weight,
)
from flowgrove.recipe.loading import parse_recipe
from policy_cases import CPU, TEXTS, encoded, policy_of
from tiny_families import MODELS, sampled

pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")

ARCHITECTURES = Path(flowgrove.models.__file__).parent / "architectures"


def recipe_of(family, folder, **model):
    model = {"adapter": "sd3", "path": "tiny"} | MODELS.get(family, {}) | {"path": str(folder)} | model
    return parse_recipe(
        {
            "model": model,
            "data": {"prompts": "unused.txt"},
            "rollout": {"precision": "int8"},
            "reward": [{"name": "jpeg_size"}],
            "engine": {"device": "cpu"},
        }
    )


def velocity(policy, rows=2):
    prompts, generator = encoded(policy, TEXTS[:1]), torch.Generator().manual_seed(0)
    x = torch.randn(rows, *policy.adapter.latent_shape, generator=generator).to(policy.device)
    sigma, prompt = torch.full((rows,), 0.6), torch.zeros(rows, dtype=torch.int64)
    with torch.no_grad():
        v = policy.velocity(x, sigma.to(policy.device), prompts, prompt.to(policy.device)).v
    return v.float()


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", sampled())
@pytest.mark.parametrize(("dtype", "lora"), [("bf16", {"rank": 4, "alpha": 8}), ("fp32", None)])
def test_every_family_computes_nearly_the_same_in_8_bits(family, folders, dtype, lora):
    policy = Policy.load(recipe_of(family, folders[family], dtype=dtype, lora=lora), CPU, TEXTS)
    cheap = policy.cheap()
    layers = [module for module in cheap.adapter.transformer.modules() if isinstance(module, QuantisedLinear)]
    assert len(layers) == len(quantisable(policy.transformer, "int8")) >= 20
    full, rounded = velocity(policy), velocity(cheap)
    assert 0 < apart(rounded, full) < 0.05
    assert not any(isinstance(module, QuantisedLinear) for module in policy.transformer.modules())
    assert cheap.weights_in_use != policy.weights_in_use  # recordings are of one precision each


@pytest.mark.parametrize("name", ["flux1_dev", "qwen_image", "sd35_medium", "wan21_1_3b"])
def test_of_published_models_the_layers_of_tokens_are_rounded_and_no_others(name):
    with torch.device("meta"):
        transformer = model_from_config(ARCHITECTURES / name, "transformer")
    rounded = quantisable(transformer, "fp8")
    left = {
        name.split(".", 2)[2] if "blocks." in name else name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name not in rounded
    }
    assert set(quantisable(transformer, "int8")) == set(rounded)
    of_blocks = {"norm1.linear", "norm1_context.linear", "norm.linear", "img_mod.1", "txt_mod.1"}
    outside = ("embed", "proj_out", "norm_out", "img_in", "txt_in", "condition")
    assert all(layer in of_blocks or any(part in layer for part in outside) for layer in left)
    assert min(min(layer.in_features, layer.out_features) for layer in rounded.values()) >= 1536


@pytest.mark.parametrize("name", sorted(path.name for path in ARCHITECTURES.iterdir()))
def test_no_modulation_of_a_published_model_is_rounded(name):
    with torch.device("meta"):
        transformer = model_from_config(ARCHITECTURES / name, "transformer")
    rounded = quantisable(transformer, "int8")
    assert rounded
    assert not [layer for layer in rounded if "mod" in layer.lower().replace("model", "") or "norm" in layer]


def test_lora_layers_are_shared_and_run_as_they_are():
    policy = Policy.load(recipe_of("sd3", "tiny", dtype="fp32", lora={"rank": 4, "alpha": 8}), CPU, TEXTS)
    assert not any("lora_" in name for name in quantisable(policy.transformer, "int8"))
    cheap = policy.cheap()
    own = {id(p) for p in policy.transformer.parameters()}
    assert all(id(p) in own for p in cheap.adapter.transformer.parameters())
    before = velocity(cheap)
    codes = {name: layer.codes.clone() for name, layer in policy.weights._cheap.layers.items()}
    with torch.no_grad():
        for weight in policy.weights.trainable().values():
            weight.add_(0.05)
    policy.weights.refresh()
    after, full = velocity(policy.cheap()), velocity(policy)
    assert apart(after, before) > 0.1
    assert apart(after, full) < 0.05
    assert all(torch.equal(layer.codes, codes[name]) for name, layer in policy.weights._cheap.layers.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_rounded_weights_follow_those_that_train_in_place(dtype):
    policy = Policy.load(recipe_of("sd3", "tiny", dtype=dtype), CPU, TEXTS)
    copy = policy.weights._cheap
    places = {name: (layer.codes.data_ptr(), layer.scale.data_ptr()) for name, layer in copy.layers.items()}
    transformer = policy.cheap().adapter.transformer
    with torch.no_grad():
        for weight in policy.weights.trainable().values():
            weight.mul_(1.5)
    policy.weights.refresh()
    cheap = policy.cheap()
    assert cheap.adapter.transformer is transformer
    assert places == {name: (layer.codes.data_ptr(), layer.scale.data_ptr()) for name, layer in copy.layers.items()}
    fresh = QuantisedCopy(policy.transformer, "int8", policy.compute_dtype)
    for name, layer in fresh.layers.items():
        assert torch.equal(layer.codes, copy.layers[name].codes)
        assert torch.equal(layer.scale, copy.layers[name].scale)
    assert apart(velocity(cheap), velocity(policy)) < 0.1


def test_weights_that_change_places_are_followed_too():
    """As with the averaged weights that an evaluation draws with."""
    policy = Policy.load(recipe_of("sd3", "tiny", dtype="fp32"), CPU, TEXTS)
    layer = next(iter(policy.weights._cheap.layers.values()))
    scale = layer.scale.clone()
    others = {name: 2 * weight.detach() for name, weight in policy.weights.trainable().items()}
    policy.weights.exchange(others)
    policy.cheap()
    torch.testing.assert_close(layer.scale, 2 * scale)
    policy.weights.exchange(others)
    policy.cheap()
    assert torch.equal(layer.scale, scale)


@pytest.mark.skipif(
    not quantised.ADDS_EXACTLY, reason="this CPU adds products of bytes up in 16 bits, and torchao lets it"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_products_are_torchaos(dtype):
    """Its activations have the range ±127.5, so that single codes differ."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96).to(dtype).requires_grad_(False), torch.randn(50, 64, dtype=dtype)
    exact = layer(x).double()
    y = _int8_product(x, *quantised_weight(layer.weight, "int8"), layer.bias, dtype)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    theirs = layer(x)
    assert y.dtype == theirs.dtype == dtype
    assert apart(y.double(), exact) <= 1.1 * apart(theirs.double(), exact)
    assert apart(y.double(), theirs.double()) < 0.01


@pytest.mark.parametrize("exact", [True, False])
def test_int8_products_are_those_of_rounded_numbers(monkeypatch, exact):
    """Against float64, with the weight's own codes; rows of zeros give the bias. Also where a CPU's own product of
    bytes is none.
    """
    if exact and not quantised.ADDS_EXACTLY:
        pytest.skip("this CPU adds products of bytes up in 16 bits")
    monkeypatch.setattr(quantised, "ADDS_EXACTLY", exact)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(24, 40), torch.randn(24), torch.randn(7, 40)
    x[3] = 0
    codes, scale = quantised_weight(weight, "int8")
    of_row = x.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (x.double() / of_row).round()
    expected = rounded @ codes.double().t() * of_row * scale.double() + bias.double()
    torch.testing.assert_close(
        _int8_product(x, codes, scale, bias, torch.float32).double(), expected, rtol=1e-5, atol=1e-5
    )
    assert float((codes.double() * scale.double()[:, None] - weight).abs().max() / scale.max()) <= 0.51


def test_float8_products_are_near_the_exact_ones(monkeypatch):
    """On the CPU's own product of float8; torchao asks for a GPU before it rounds."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64).bfloat16(), torch.randn(96).bfloat16(), torch.randn(50, 64).bfloat16()
    x[3] = 0
    codes, scale = quantised_weight(weight, "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(
        codes.double() * scale.double()[:, None], weight.double(), rtol=2**-4, atol=float(scale.max())
    )
    y = _fp8_product(x, codes, scale, bias, torch.bfloat16)
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert 0.001 < apart(y.double(), exact) < 0.05
    torch.testing.assert_close(y[3], bias)


def test_without_torchao_the_error_says_how_to_get_it(monkeypatch):
    import sys

    quantised._rounding.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="precision is int8, which needs torchao: pip install torchao"):
        check_precision("int8", CPU)


def test_a_transformer_without_such_layers_is_refused():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(12, 20)])

    with pytest.raises(UserError, match="no plain linear layer of the transformer's blocks has multiples of 8"):
        QuantisedCopy(Small(), "int8", torch.float32)


def test_weights_that_a_folder_holds_quantised_stay_as_they_are():
    """torchao's tensors, and libraries' own classes of layers."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    class Packed(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), Packed(16, 16)])

    model = Model()
    quantize_(model.blocks[0], Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    assert list(quantisable(model, "int8")) == ["blocks.1"]


def test_a_policy_without_a_precision_has_no_cheap_one():
    with pytest.raises(ValueError, match="no cheap copy"):
        policy_of("fp32").cheap()


@pytest.mark.long
def test_compiled_blocks_of_both_precisions_stay_apart():
    """Without a compiler: torch's own graphs, run as they are."""
    policy = Policy.load(recipe_of("sd3", "tiny", dtype="fp32", lora={"rank": 4, "alpha": 8}), CPU, TEXTS)
    eager = [velocity(one) for one in (policy, policy.cheap())]
    torch._dynamo.reset()
    try:
        for transformer in (policy.transformer, policy.cheap().adapter.transformer):
            for block in blocks_of(transformer):
                block.compile(backend="eager", dynamic=True, fullgraph=True)
        for one, expected in zip((policy, policy.cheap()) * 2, eager * 2, strict=True):
            torch.testing.assert_close(velocity(one), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch._dynamo.reset()


def test_a_copy_is_compiled_by_itself():
    policy = Policy.load(recipe_of("sd3", "tiny", dtype="fp32"), CPU, TEXTS)
    for block in blocks_of(policy.transformer):
        block.compile(backend="eager")
    policy.weights.cheapen("int8")
    assert all(block._compiled_call_impl is None for block in blocks_of(policy.cheap().adapter.transformer))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [3, 40])
def test_products_on_a_gpu_are_those_of_the_formula(precision, rows):
    """In float64, of the same codes; torch's own float8 product takes no scale per row on a CPU."""
    if precision == "fp8" and not has_fp8(torch.device("cuda")):
        pytest.skip("no float8 on this GPU")
    torch.manual_seed(0)
    layer = nn.Linear(64, 96).bfloat16().cuda().requires_grad_(False)
    x = torch.randn(2, rows, 64, device="cuda", dtype=torch.bfloat16)
    own = QuantisedLinear(layer, precision, torch.bfloat16, *quantised_weight(layer.weight, precision))
    assert apart(own(x).float(), layer(x).float()) < 0.05
    most = 127 if precision == "int8" else 448
    scale = x.float().abs().amax(-1, keepdim=True) / most
    rounded = (x.float() / scale).round() if precision == "int8" else (x.float() / scale).to(torch.float8_e4m3fn)
    expected = rounded.double() @ own.codes.double().t() * scale.double() * own.scale.double() + layer.bias.double()
    assert apart(own(x).double(), expected) < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_velocities_on_a_gpu_are_nearly_those_of_full_precision(precision):
    cuda = torch.device("cuda")
    if precision == "fp8" and not has_fp8(cuda):
        pytest.skip("no float8 on this GPU")
    policy = Policy.load(recipe_of("sd3", "tiny", dtype="bf16", lora={"rank": 4, "alpha": 8}), cuda, TEXTS)
    policy.weights.cheapen(precision)
    for rows in (1, 3):
        assert 0 < apart(velocity(policy.cheap(), rows), velocity(policy, rows)) < 0.1
