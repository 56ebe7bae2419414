"""What training passes keep for their backward: the gradient stays, memory and the work that is repeated do not."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.plan.allocations import graph_bytes
from flowgrove.plan.flops import count_flops
from flowgrove.recipe.checks import check_meaning
from flowgrove.recipe.loading import parse_recipe
from policy_cases import CPU, encoded, small_recipe

TINY = {"adapter": "sd3", "path": "tiny", "dtype": "fp64"}
LORA = {"rank": 4, "alpha": 8}
KINDS = ("none", "selective", "full")


def policy_of(kind, **model):
    return Policy.load(small_recipe(model={**TINY, "gradient_checkpointing": kind, **model}), CPU)


def velocity(policy, rows=2):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *policy.adapter.latent_shape, generator=draw).to(policy.state_dtype)
    prompt = torch.zeros(rows, dtype=torch.int64)
    return policy.velocity(x, torch.linspace(0.7, 0.3, rows), encoded(policy), prompt).v


class Ops(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def in_backward(kind, **model):
    """How often each op runs in the backward of a pass."""
    v = velocity(policy_of(kind, **model))
    with Ops() as ops:
        v.square().sum().backward()
    return ops.count


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_gradient_is_the_same_in_float64(lora):
    gradients = []
    for kind in KINDS:
        policy = policy_of(kind, lora=lora)
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(number))
        velocity(policy).square().sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in policy.weights.trainable().values()]))
    norm = float(gradients[0].norm())
    assert norm > 1e-6
    for other in gradients[1:]:
        assert float((gradients[0] - other).norm()) <= 1e-12 * norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_attention_and_products_do_not_run_again(dtype):
    counts = {kind: in_backward(kind, dtype=dtype) for kind in KINDS}
    attention = next(name for name in counts["full"] if "scaled_dot_product" in name and "backward" not in name)
    assert counts["none"][attention] == counts["selective"][attention] == 0 < counts["full"][attention]
    for product in ("aten.addmm.default", "aten.mm.default"):
        assert counts["none"][product] == counts["selective"][product]
    assert counts["none"]["aten.addmm.default"] < counts["full"]["aten.addmm.default"]
    assert counts["none"]["aten.gelu.default"] < counts["selective"]["aten.gelu.default"]


def test_the_second_product_of_lora_runs_again():
    """It takes rank numbers an element, and keeping it would take as much memory as the layer's own."""
    counts = {kind: in_backward(kind, lora=LORA) for kind in KINDS}
    layers = sum("lora_B" in name for name in policy_of("none", lora=LORA).weights.trainable())
    again = counts["selective"]["aten.mm.default"] - counts["none"]["aten.mm.default"]
    # the last layer of a block need not run again, nor what no later op of it needs
    assert layers // 2 <= again <= layers
    assert counts["none"]["aten.addmm.default"] == counts["selective"]["aten.addmm.default"]


def test_it_holds_less_than_everything_and_more_than_the_inputs_of_blocks():
    none, selective, full = (graph_bytes(partial(velocity, policy_of(kind, dtype="fp32"))) for kind in KINDS)
    assert full < selective < none


def test_what_runs_again_is_counted():
    none, selective, full = (
        count_flops(small_recipe(model={**TINY, "gradient_checkpointing": kind, "lora": LORA}))[0] for kind in KINDS
    )
    assert none.train == selective.train == full.train
    assert none.recomputed == 0 < selective.recomputed < 0.1 * full.recomputed
    assert full.recomputed > 0.8 * full.forward


@pytest.mark.parametrize(("written", "read"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_true_and_false_are_full_and_none(written, read):
    recipe = small_recipe(model={**TINY, "gradient_checkpointing": written})
    assert recipe.model.gradient_checkpointing == read
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_compiled_blocks_keep_nothing_selectively():
    recipe = small_recipe(model={**TINY, "gradient_checkpointing": "selective"}, engine={"compile": True})
    with pytest.raises(UserError, match=r"engine\.compile.*write full or none"):
        check_meaning(recipe)
