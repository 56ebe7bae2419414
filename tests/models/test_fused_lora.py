"""LoRA's second product that adds to the base layer's output: what peft computes, in fewer passes over memory."""

import copy
from collections import Counter

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrove.models.fused_lora import FusedLinear, fuse_lora
from flowgrove.models.trainable import choose_trainable
from flowgrove.models.twins import twin
from flowgrove.recipe.schema import Lora


def layer_of(dtype=torch.float64, **options):
    """A layer of peft's with weights that matter."""
    torch.manual_seed(0)
    layer = Linear(nn.Linear(12, 20), "default", config=LoraConfig(r=4, lora_alpha=6, **options), r=4, lora_alpha=6)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.requires_grad_(False)
    return layer.to(dtype)


def fused(layer):
    other = copy.deepcopy(layer)
    assert fuse_lora(nn.ModuleList([other])) == 1
    return other


class Ops(TorchDispatchMode):
    """Counts the ops that touch as many numbers as the layer gives."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.count = numbers, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numbers:
            self.count[func.overloadpacket.__name__] += 1
        return out


def ran(layer, x, weight):
    """The output, all gradients, and the large ops of forward and backward."""
    x = x.detach().clone().requires_grad_()
    with Ops(weight.numel()) as ops:
        y = layer(x)
        y.backward(weight)
    return y, [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)], ops.count


@pytest.mark.parametrize("trains", [True, False])
def test_layers_of_two_dtypes_run_as_peft_has_them(trains):
    layer = layer_of(torch.float32)
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    with torch.set_grad_enabled(trains):
        assert torch.equal(fused(layer)(x), layer(x))


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (1, 1, 12)])
def test_it_gives_what_peft_gives_and_its_gradients(shape):
    layer, x = layer_of(), torch.randn(*shape, dtype=torch.float64)
    weight = torch.randn(*shape[:-1], 20, dtype=torch.float64)
    (y, gradients, _), (expected, others, _) = ran(fused(layer), x, weight), ran(layer, x, weight)
    assert torch.allclose(y, expected, rtol=1e-13, atol=1e-13)
    assert len(gradients) == len(others) == 3
    assert all(torch.allclose(one, two, rtol=1e-13, atol=1e-13) for one, two in zip(gradients, others, strict=True))
    assert min(float(one.norm()) for one in gradients) > 1e-3


def test_nothing_is_scaled_or_added_at_the_size_of_the_output():
    layer, x, weight = layer_of(), torch.randn(3, 6, 12).double(), torch.randn(3, 6, 20).double()
    (_, _, ours), (_, _, theirs) = ran(fused(layer), x, weight), ran(layer, x, weight)
    assert (theirs["mul"], theirs["add"]) == (2, 1)
    assert (ours["mul"], ours["add"]) == (0, 0)
    assert ours["addmm"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_it_gives_the_same_bits(dtype):
    layer, x = fused(layer_of(dtype)), torch.randn(2, 7, 12, dtype=dtype)
    y = layer(x).detach()
    with torch.no_grad():
        assert torch.equal(layer(x), y)
        strided = layer(x.mT.contiguous().mT)  # products of it are rounded otherwise
        assert torch.allclose(strided, y, rtol=2e-2, atol=2e-2)


def test_compiled_it_is_peft_whose_passes_are_joined_with_others(fresh_dynamo):
    graphs, layer, x = [], fused(layer_of()), torch.randn(2, 7, 12, dtype=torch.float64)
    compiled = torch.compile(layer, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.allclose(compiled(x), layer(x), rtol=1e-13, atol=1e-13)
    (graph,) = graphs
    assert not any("addmm" in str(node.target) for node in graph.graph.nodes)


def test_in_bf16_it_is_nearer_to_the_exact_result_than_peft():
    exact, x = layer_of(torch.float32), torch.randn(64, 12)
    layer = copy.deepcopy(exact).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(layer)(x), layer(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    y = exact(x).detach()
    assert float((ours.detach() - y).norm()) <= float((theirs.detach() - y).norm())


def test_weights_in_fp32_under_autocast_run_too():
    layer, x = layer_of(torch.float32), torch.randn(2, 5, 12)
    layer.base_layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(layer)(x), layer(x)
        with torch.no_grad():
            assert torch.equal(fused(layer)(x), ours)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2)


def test_switched_off_or_merged_it_is_peft():
    layer, x = layer_of(), torch.randn(5, 12, dtype=torch.float64)
    one = fused(layer)
    one.enable_adapters(False)
    assert torch.equal(one(x), layer.base_layer(x))
    one.enable_adapters(True)
    one.merge()
    assert torch.allclose(one(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_are_not_plain_stay_as_they_are(options):
    layer = layer_of(**options)
    if "lora_dropout" in options:
        layer.lora_dropout["default"] = nn.Dropout(0.1)
    elif "use_dora" in options:
        layer.lora_variant["default"] = object()
    else:
        layer.lora_B["default"].bias = nn.Parameter(torch.zeros(20))
    assert fuse_lora(nn.ModuleList([layer])) == 0
    assert type(layer) is Linear


def test_a_twin_of_it_runs_on_the_layer_that_it_was_given():
    one, x = fused(layer_of()), torch.randn(5, 12, dtype=torch.float64)
    other = nn.Linear(12, 20).double()
    y = twin(one, {one.base_layer: other})(x)
    assert torch.allclose(y - other(x), one(x) - one.base_layer(x), rtol=1e-12, atol=1e-12)


def test_a_transformers_lora_layers_all_fuse():
    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    choose_trainable(transformer, Lora(rank=2, alpha=4), ("to_q", "to_v"), 0)
    kinds = {type(module) for module in transformer.modules() if isinstance(module, BaseTunerLayer)}
    assert kinds == {FusedLinear}
