"""engine.attention: what is usable, what is refused, and that a backend computes the same velocity."""

import pytest
import torch

from flowgrove.doctor import findings
from flowgrove.errors import UserError
from flowgrove.models import attention
from flowgrove.models.policy import Policy
from policy_cases import CPU, encoded, small_recipe
from tiny_pipelines import MODELS, write_pipeline

SD3 = {"adapter": "sd3", "path": "tiny", "dtype": "fp32"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write_pipeline(name, root / name) for name in ("flux", "wan", "qwen_image")}


@pytest.fixture(autouse=True)
def default_backend():
    """diffusers remembers the last backend for the whole process."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def policy_with(model, wanted):
    return Policy.load(small_recipe(model=model, engine={"device": "cpu", "attention": wanted}), CPU)


@pytest.mark.parametrize("wanted", ["auto", "sdpa"])
def test_pytorchs_own_attention_does_without_cudnns_kernels(folders, wanted, monkeypatch):
    """Their backward ended a run on an H200 with an illegal memory access."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    policy_with({**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32"}, wanted)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("name", ["flux", "wan"])
@torch.no_grad()
def test_another_backend_gives_the_same_velocity(folders, name):
    model = {**MODELS[name], "path": str(folders[name]), "dtype": "fp32"}
    found = []
    for wanted in ("auto", "sdpa", "_native_math"):
        policy = policy_with(model, wanted)
        x = torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
        found.append(policy.velocity(x, torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v)
        used = {
            str(m.processor._attention_backend)
            for m in policy.transformer.modules()
            if hasattr(getattr(m, "processor", None), "_attention_backend")
        }
        assert used == {"None"} if wanted == "auto" else used != {"None"}
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("flash", "pip install flash-attn"),
        ("flash3", "build flash-attn 3"),
        ("xformers", "pip install xformers"),
        ("cudnn", "it needs a GPU"),
        ("nonsense", "known are .*sdpa"),
    ],
)
def test_what_cannot_run_is_refused_with_what_to_do(folders, wanted, text):
    with pytest.raises(UserError, match=f"engine.attention is {wanted}: .*{text}") as caught:
        policy_with({**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32"}, wanted)
    assert "\n" not in str(caught.value)


def test_sd3_takes_sdpa_or_xformers(monkeypatch):
    policy_with(SD3, "sdpa")
    monkeypatch.setattr(attention, "missing", lambda wanted, device: None)
    with pytest.raises(UserError, match="the sd3 transformer of diffusers takes sdpa"):
        policy_with(SD3, "flash")
    policy = policy_with(SD3, "xformers")
    kinds = {type(m.processor).__name__ for m in policy.transformer.modules() if hasattr(m, "processor")}
    assert kinds == {"XFormersJointAttnProcessor"}


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [("qwen_image", {}, "takes no mask"), ("flux", {"dtype": "bf16"}, "norms train in fp32")],
)
def test_backends_without_masks_or_mixed_precision_are_refused_where_those_are_needed(
    folders, monkeypatch, name, changes, text
):
    monkeypatch.setattr(attention, "missing", lambda wanted, device: None)
    model = {**MODELS[name], "path": str(folders[name]), "dtype": "fp32", **changes}
    for wanted in ("flash", "flash3", "_native_flash", "sage"):
        with pytest.raises(UserError, match=f"engine.attention is {wanted}.*{text}"):
            policy_with(model, wanted)


def test_doctor_says_which_are_usable():
    told = dict(findings())["attention"]
    assert "sdpa" in told
    assert "pip install" in told
