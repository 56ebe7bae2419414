"""Numbers that a GPU's autocast leaves in fp32 are rounded once, and the model gives the same bits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowgrove.models import weights
from flowgrove.models.policy import Policy
from flowgrove.plan.allocations import peak_bytes
from policy_cases import CPU, encoded, small_recipe
from tiny_families import FAMILIES, MODELS, sampled

LORA = {"rank": 2, "alpha": 4}
ROUND_THEMSELVES = ("wan", "ltx", "z_image")  # whose own code casts what norms give


class Casts(TorchDispatchMode):
    """Counts the numbers that are cast from fp32 to bf16."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and (args[0].dtype, out.dtype) == (torch.float32, torch.bfloat16):
            self.numbers += out.numel()
        return out


def ran(folders, name, dtype="bf16"):
    """Velocity and gradients of a pass where norms give fp32, as on a GPU; and how many numbers were cast."""
    folder = {"path": folders[name]} if name in FAMILIES else {"path": "tiny"}
    model = {**MODELS.get(name, {"adapter": name}), **folder, "dtype": dtype, "lora": LORA}
    policy = Policy.load(small_recipe(model={**model, "gradient_checkpointing": False}), CPU)
    for parameter in policy.weights.trainable().values():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    policy.weights.refresh()
    prompts, first = encoded(policy), torch.zeros(1, dtype=torch.long)
    x = torch.randn(1, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    casts, found = Casts(), {}

    def run():
        with casts:
            found["v"] = policy.velocity(x.to(policy.state_dtype), torch.tensor([0.7]), prompts, first).v
        found["v"].double().square().mean().backward()

    peak_bytes(run, like_cuda=True)
    gradients = {name: p.grad for name, p in policy.weights.trainable().items() if p.grad is not None}
    policy.weights.drop_gradients()
    return found["v"].detach(), gradients, casts.numbers


@pytest.mark.parametrize("name", sampled("sd3", "flux", "qwen_image", "wan"))
def test_a_forward_has_the_same_bits_and_its_gradients_differ_by_rounding(folders, name, monkeypatch):
    v, gradients, casts = ran(folders, name)
    monkeypatch.setattr(weights, "narrow_states", lambda transformer: None)
    expected, others, more = ran(folders, name)
    assert torch.equal(v, expected)
    assert gradients.keys() == others.keys()
    ours, theirs = (torch.cat([g.flatten().float() for g in some.values()]) for some in (gradients, others))
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm()) <= 2e-2 * float(theirs.norm())
    if name.startswith(ROUND_THEMSELVES):
        assert casts == more
    else:
        assert casts < more


def test_without_autocast_nothing_changes(folders, monkeypatch):
    v, gradients, casts = ran(folders, "flux", "fp32")
    monkeypatch.setattr(weights, "narrow_states", lambda transformer: None)
    expected, others, _ = ran(folders, "flux", "fp32")
    assert torch.equal(v, expected)
    assert all(torch.equal(gradients[name], others[name]) for name in others)
    assert casts == 0
