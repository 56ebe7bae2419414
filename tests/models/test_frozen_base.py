"""model.base_precision: a LoRA over frozen weights in few bits trains as over their dequantised copy."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from engine_cases import metrics_of, refuse, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.models import frozen_base
from flowgrove.models.folders import ARCHITECTURES
from flowgrove.models.frozen_base import FrozenLinear, compress, compressible
from flowgrove.models.parts import model_from_config
from flowgrove.models.policy import Policy
from flowgrove.plan.memory import MemoryModel, predict_memory
from flowgrove.plan.planner import make_plan
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from planner_cases import user_error
from policy_cases import CPU, encoded, small_recipe
from subprocesses import ROOT

LORA = {"rank": 2, "alpha": 4}
MODEL = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "lora": LORA, "gradient_checkpointing": False}
GIB = 2**30


def with_library(precision):
    library = "bitsandbytes" if precision == "nf4" else "torchao"
    absent = importlib.util.find_spec(library) is None
    return pytest.param(precision, marks=pytest.mark.skipif(absent, reason=f"{library} is not installed"))


PRECISIONS = [with_library(precision) for precision in ("int8", "fp8", "nf4")]


def one_block(layer):
    """A transformer of one block, which is a linear layer beside an activation."""
    transformer = nn.Module()
    transformer.transformer_blocks = nn.ModuleList([nn.Sequential(nn.SiLU(), layer)])
    return transformer.requires_grad_(False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("sides", "bias"), [((63, 31), True), ((128, 64), False), ((3, 129), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradient_are_those_of_the_dequantised_weight(precision, sides, bias, dtype):
    torch.manual_seed(0)
    plain = nn.Linear(*sides, bias=bias, dtype=dtype)
    transformer = one_block(plain)
    compress(transformer, precision, dtype, CPU)
    layer = transformer.transformer_blocks[0][1]
    assert isinstance(layer, FrozenLinear)
    step = {"int8": 1 / 127, "fp8": 1 / 14, "nf4": 0.2}[precision]  # half of the widest gap between codes
    weight, exact = layer.widened().double(), plain.weight.double()
    assert 0 < (weight - exact).abs().max() <= step * exact.abs().max()

    x = torch.randn(2, 5, sides[0], dtype=dtype)
    x[1, 0] = 0
    upstream = torch.linspace(-1, 1, 10 * sides[1]).view(2, 5, sides[1]).to(dtype)

    def run(product, x):
        x = x.clone().requires_grad_()
        y = product(x)
        return y.double(), torch.autograd.grad(y, x, upstream.to(y.dtype))[0].double()

    offset = plain.bias.double() if bias else None
    expected = run(lambda x: nn.functional.linear(x, weight, offset), x.double())
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for right, found in zip(expected, run(layer, x), strict=True):
        assert (found - right).abs().max() <= tolerance * right.abs().max()


def loaded(**model):
    return Policy.load(small_recipe(model={**MODEL, **model}), CPU)


def dequantised(policy):
    """The same policy over plain layers that hold what its codes give."""
    for name, layer in [*policy.transformer.named_modules()]:
        if isinstance(layer, FrozenLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.widened().to(policy.compute_dtype), requires_grad=False)
            plain.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(policy.transformer.get_submodule(parent), last, plain)
    return policy


def velocity_and_gradients(policy):
    """With LoRA layers whose B is not zero."""
    policy.weights.drop_gradients()
    generator = torch.Generator().manual_seed(3)
    weights = policy.weights.trainable()
    policy.weights.load({name: torch.randn(p.shape, generator=generator) / 4 for name, p in weights.items()})
    x = torch.randn(2, *policy.adapter.latent_shape, generator=generator)
    v = policy.velocity(x, torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v
    v.backward(torch.linspace(-1, 1, v.numel()).view_as(v).to(v.dtype))
    return v.detach(), {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [("fp32", "full"), pytest.param("bf16", "selective", marks=pytest.mark.long)]
)
def test_a_lora_trains_as_over_the_dequantised_copy(precision, dtype, checkpointing):
    model = {"dtype": dtype, "gradient_checkpointing": checkpointing}
    policy = loaded(base_precision=precision, **model)
    found, expected = velocity_and_gradients(policy), velocity_and_gradients(dequantised(policy))
    exact = velocity_and_gradients(loaded(**model))
    tolerance = 1e-4 if dtype == "fp32" else 5e-2

    def apart(one, other):
        """(velocity, gradient), as shares of their norms."""
        pairs = [one[0]], [other[0]], [*one[1].values()], [*other[1].values()]
        v, v_other, grad, grad_other = (torch.cat([part.double().flatten() for part in parts]) for parts in pairs)
        return torch.stack([(v - v_other).norm() / v_other.norm(), (grad - grad_other).norm() / grad_other.norm()])

    assert (apart(found, expected) < tolerance).all()
    assert dtype == "bf16" or (apart(found, exact) > 10 * apart(found, expected)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bytes_of_a_rounded_model_are_predicted(precision):
    recipe = small_recipe(model={**MODEL, "dtype": "bf16", "base_precision": precision})
    transformer = Policy.load(recipe, CPU).transformer
    held = sum(tensor.nbytes for tensor in (*transformer.parameters(), *transformer.buffers()))
    tables = ("part_1", "part_4")  # the 16 and 256 numbers of nf4
    held -= sum(part.nbytes for name, part in transformer.named_buffers() if name.endswith(tables))
    found = MemoryModel(recipe, make_plan(recipe, 0), "cpu").resident(4096)["transformer"]
    assert found == pytest.approx(held, rel=0.025)  # tables of places are predicted in fp32


def compressed(transformer):
    return [layer for layer in transformer.modules() if isinstance(layer, FrozenLinear)]


@pytest.mark.parametrize("name", ["flux1_dev", "qwen_image", "sd35_medium", "wan21_1_3b"])
def test_nearly_all_of_a_published_transformer_is_rounded(name):
    with torch.device("meta"):
        transformer = model_from_config(ARCHITECTURES / name, "transformer")
    rounded = sum(layer.weight.numel() for layer in compressible(transformer).values())
    assert rounded > 0.95 * sum(weight.numel() for weight in transformer.parameters())


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "change", "card"), [("mix_flux", (), 24), ("mix_qwen", ("engine.token_budget=4096",), 32)]
)
def test_a_lora_of_the_large_models_fits_a_small_card(recipe, change, card):
    told = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", ("model.base_precision=nf4", *change))
    assert predict_memory(told, Setup(told).first_plan, "cuda").peak < 0.9 * card * GIB


def test_a_run_trains_over_rounded_weights_and_goes_on_with_the_same(tmp_path):
    pytest.importorskip("torchao")
    recipe = tiny_recipe(
        tmp_path, model={"lora": LORA, "base_precision": "int8"}, update={"kl_weight": 0.1},
        data={"eval_prompts": None},
        run={"iterations": 1, "eval_every": 0}, rollout={"group_size": 2},
    )  # fmt: skip
    succeed("train", recipe, "--out", tmp_path / "run")
    (line,) = metrics_of(tmp_path / "run")
    assert abs(line["ratio_mean"] - 1) < 1e-3
    assert line["grad_norm"] > 0
    told = refuse("train", recipe, "--out", tmp_path / "run", "--set", "model.base_precision=null", "--set",
                  "run.iterations=2")  # fmt: skip
    assert 'model.base_precision is null instead of the run\'s "int8"' in told


@pytest.mark.parametrize(
    ("other", "instead"),
    [("engine.distributed: fsdp2", "ddp"), ("rollout.precision: int8", "null"), ("model.dtype: fp64", "fp32 or bf16")],
)
def test_what_does_not_go_with_it_is_one_line(tmp_path, other, instead):
    recipe = tiny_recipe(tmp_path, model={"lora": LORA, "base_precision": "int8"})
    told = f"{other} does not go with model.base_precision: int8: write {instead}, or model.base_precision: null"
    assert told in user_error(load_recipe, recipe, (other.replace(": ", "="),))


def test_it_is_for_a_lora(tmp_path):
    recipe = tiny_recipe(tmp_path, model={"lora": LORA, "base_precision": "int8"})
    told = user_error(load_recipe, recipe, ("model.lora=null",))
    assert "model.base_precision: int8 rounds frozen weights, and with model.lora: null all of them train" in told


@pytest.mark.parametrize(("precision", "library"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_library_is_one_line(precision, library, monkeypatch):
    part = {"torchao": "quantization", "bitsandbytes": "functional"}[library]
    monkeypatch.setitem(sys.modules, f"{library}.{part}", None)
    frozen_base._bitsandbytes.cache_clear()
    with pytest.raises(UserError, match=f"model.base_precision is {precision}, which needs {library}: pip install"):
        compress(one_block(nn.Linear(8, 8)), precision, torch.float32, CPU)


def test_a_model_without_plain_layers_is_one_line():
    with pytest.raises(UserError, match="no linear layer of the transformer's blocks is plain: write null"):
        compress(one_block(nn.Identity()), "int8", torch.float32, CPU)
