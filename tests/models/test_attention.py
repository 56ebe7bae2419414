"""engine.attention: what is usable, what is refused, and that a backend computes the same velocity."""

import inspect

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch

from flowgrove.doctor import findings
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models import attention
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove.update.updater import Updater
from policy_cases import CPU, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import MODELS

SD3 = {"adapter": "sd3", "path": "tiny", "dtype": "fp32"}


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


@pytest.mark.parametrize("section", ["engine", "rollout"])
@torch.no_grad()
def test_a_kernel_gets_queries_and_keys_in_the_dtype_of_its_values(folders, monkeypatch, section):
    """CUDA's autocast computes RMSNorm in fp32, a CPU's does not: flash would meet fp32 beside bf16 on a GPU alone."""
    seen, flash = [], dispatch.AttentionBackendName.FLASH

    def kernel(query, key, value):
        seen.append((query.dtype, key.dtype, value.dtype))
        return query

    def forward(self, x):
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)

    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda *_: None)
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", forward)
    registry = dispatch._AttentionBackendRegistry
    monkeypatch.setitem(registry._backends, flash, kernel)
    monkeypatch.setitem(registry._supported_arg_names, flash, {"query", "key", "value"})
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "bf16", "lora": {"rank": 4, "alpha": 8}}
    policy = Policy.load(small_recipe(model=model, **{section: {"attention": "flash"}}), CPU)
    policy = policy if section == "engine" else policy.cheap()
    x = torch.randn(1, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    policy.velocity(x, torch.tensor([0.7]), encoded(policy), torch.tensor([0]))
    assert set(seen) == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize(
    ("engine", "rollout", "alone"),
    [
        ("auto", None, False), ("sdpa", "sage", False), ("flash3", None, False), ("sdpa_flash", None, True),
        ("auto", "cudnn", True), ("_native_math", "flash", True), ("auto", "_native_efficient", True),
    ],
)  # fmt: skip
def test_nothing_runs_beside_kernels_that_are_chosen_for_the_whole_process(engine, rollout, alone):
    """While such a kernel runs, an autoencoder's or a reward's attention in another thread finds no other."""
    plain = small_recipe(engine={"ahead": True})
    policy = Policy.load(plain, CPU)
    recipe = plain.model_copy(
        update={
            "engine": plain.engine.model_copy(update={"attention": engine}),
            "rollout": plain.rollout.model_copy(update={"attention": rollout}),
        }
    )
    stages = Stages(Setup(recipe), policy, Updater(recipe, policy, runner_of(policy, recipe)), Rewards(recipe, CPU))
    assert (stages.scores_on_a_thread, stages._ahead is None) == (not alone, alone)


def test_kernels_that_set_flags_of_the_process_are_known():
    """diffusers' own functions call PyTorch's attention inside a context that sets them."""
    found = {
        name.value
        for name, kernel in dispatch._AttentionBackendRegistry._backends.items()
        if "sdpa_kernel(" in inspect.getsource(getattr(kernel, "kernel", kernel))
    }
    assert found == set(attention._FLAGGED)


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


def test_sage_is_for_steps_that_do_not_train(folders, monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "bf16", "lora": {"rank": 4, "alpha": 8}}
    with pytest.raises(UserError, match=r"engine.attention is sage, which has no backward: .*rollout.attention"):
        policy_with(model, "sage")
    recipe = small_recipe(model=model, rollout={"attention": "sage"})
    assert Policy.load(recipe, CPU).cheap().adapter.transformer is not None


def test_kernels_of_bf16_are_refused_in_another_dtype(folders, monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32"}
    policy = policy_with(model, "auto")
    recipe = small_recipe(model=model).model
    names = ("flash", "flash3", "sdpa_flash", "cudnn", "flash_varlen")
    for wanted in names:
        text = rf"engine.attention is {wanted}, .*model.dtype is fp32: write model.dtype: bf16, or auto$"
        with pytest.raises(UserError, match=text):
            attention.check_attention(policy.adapter, wanted, recipe, CPU)
    for wanted in (*names, "sage", "sage_varlen", "_sage_qk_int8_pv_fp16_triton"):
        text = rf"rollout.attention is {wanted}, .*model.dtype is fp32: write model.dtype: bf16, or null$"
        with pytest.raises(UserError, match=text):
            attention.check_attention(policy.adapter, wanted, recipe, CPU, "rollout.attention")
    for key in ("engine.attention", "rollout.attention"):
        for wanted in ("sdpa", "xformers", "_native_math", "_native_efficient"):
            attention.check_attention(policy.adapter, wanted, recipe, CPU, key)


def test_kernels_of_a_hub_are_for_engine_attention_alone(monkeypatch):
    """Nothing would download them for the steps that do not train, which call them all the same."""
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda backend: None)
    gpu = torch.device("cuda")
    hub = [name for name in attention.attention_names() if name.endswith("_hub")]
    assert len(hub) >= 5
    adapter, model = policy_with(SD3, "auto").adapter, small_recipe().model
    for name in hub:
        assert attention.missing(name, gpu) is None
        for key, end in (("rollout.attention", "or write null"), ("--modes", "or leave it out")):
            with pytest.raises(UserError, match=f"{name}: kernels of a hub are downloaded for .*; {end}$"):
                attention.check_attention(adapter, name, model, gpu, key)
    assert not set(hub) & set(attention.attention_here(gpu))


def test_all_of_sages_kernels_have_no_backward():
    """By their names in diffusers, those of its hub among them."""
    untrained = {name for name in attention.attention_names() if not attention.trains_safely(name)}
    assert {"cudnn", "sage", "sage_hub", "sage_blackwell_hub", "sage_varlen"} < untrained
    assert all(name == "cudnn" or "sage" in name for name in untrained)


def test_a_kernel_that_cannot_run_is_refused_for_rollouts_too(folders):
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32"}
    with pytest.raises(UserError, match=r"rollout.attention is cudnn: it needs a GPU; or write null"):
        Policy.load(small_recipe(model=model, rollout={"attention": "cudnn"}), CPU)


@torch.no_grad()
def test_rollouts_may_have_another_backend_that_training_never_sees(folders):
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}}
    policy = Policy.load(small_recipe(model=model, rollout={"attention": "_native_math"}), CPU)
    cheap = policy.cheap()

    def backends(transformer):
        found = (getattr(module, "processor", None) for module in transformer.modules())
        return {each._attention_backend for each in found if hasattr(each, "_attention_backend")}

    assert {backend.value for backend in backends(cheap.adapter.transformer)} == {"_native_math"}
    assert backends(policy.transformer) == {None}
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] == dispatch.AttentionBackendName.NATIVE
    for parameter in policy.weights.trainable().values():  # the twin's are the same
        parameter.normal_(std=0.1)
    policy.weights.refresh()
    x = torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
    one, two = (p.velocity(x, torch.tensor([0.7, 0.3]), encoded(p), torch.tensor([0, 1])).v for p in (policy, cheap))
    assert (one - two).abs().max() <= 1e-5


def test_steps_that_do_not_train_alone_have_it(folders):
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "fp32"}
    recipe = small_recipe(model=model, rollout={"attention": "_native_math"})
    policy = Policy.load(recipe, CPU)
    plan, coefficients = plan_and_coefficients(recipe)
    seen = {}

    class Watching(PassRunner):
        def velocity(self, policy, x, sigma, *rest):
            seen[float(sigma[0])] = policy.adapter.transformer is not policy.weights.transformer
            return super().velocity(policy, x, sigma, *rest)

    rollout(
        plan, coefficients, policy, encoded(policy), Watching(runner_of(policy, recipe).budget), seed=3, iteration=0
    )
    assert seen == {torch.tensor(step.sigma).item(): not step.trained for step in plan.steps}
    assert set(seen.values()) == {True, False}


@pytest.mark.parametrize("padding", ["end", "middle"])
def test_varlen_of_diffusers_takes_the_first_keys(monkeypatch, padding):
    """Why Qwen-Image, whose text stands padded before the picture, is refused it: where this fails, it need not be."""

    def by_length(q, k, v, cu_seqlens_q, cu_seqlens_k, **_):
        def one(b):
            rows, keys = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
            parts = (t.transpose(0, 1) for t in (q[rows], k[keys], v[keys]))
            return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(0, 1)

        return torch.cat([one(b) for b in range(len(cu_seqlens_q) - 1)])

    monkeypatch.setattr(dispatch, "flash_attn_varlen_func", by_length)
    q, k, v = torch.randn(3, 2, 7, 2, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = padding == "middle"
    mask[0, 1:3] = padding == "end"
    parts = (t.transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None]).transpose(1, 2)
    found = dispatch._flash_varlen_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(found, expected, atol=1e-5) == (padding == "end")


def test_sd3_takes_sdpa_or_xformers(monkeypatch):
    policy_with(SD3, "sdpa")
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    with pytest.raises(UserError, match="the sd3 transformer of diffusers takes sdpa"):
        policy_with(SD3, "flash")
    for wanted in ("sdpa", "xformers", "_native_math"):  # its processors have no place for another
        with pytest.raises(UserError, match=rf"rollout.attention is {wanted}: .*one attention kernel.*: write null$"):
            Policy.load(small_recipe(model=SD3, rollout={"attention": wanted}), CPU)
    policy = policy_with(SD3, "xformers")
    kinds = {type(m.processor).__name__ for m in policy.transformer.modules() if hasattr(m, "processor")}
    assert kinds == {"XFormersJointAttnProcessor"}


def test_backends_without_masks_are_refused_where_those_are_needed(folders, monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    model = {**MODELS["qwen_image"], "path": str(folders["qwen_image"]), "dtype": "fp32"}
    for wanted in ("flash", "flash3", "sdpa_flash", "_native_flash", "sage", "flash_varlen"):
        with pytest.raises(UserError, match=f"engine.attention is {wanted}.*and qwen_image masks prompts"):
            policy_with(model, wanted)


def test_all_weights_train_in_bf16_with_any_backend_but_the_one_that_nothing_casts_for(folders, monkeypatch):
    """Norms train in fp32 then. What the dispatch calls gets one dtype; sd3's processor calls xformers itself."""
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda *_: None)
    model = {**MODELS["flux"], "path": str(folders["flux"]), "dtype": "bf16"}
    for wanted in ("flash", "flash3", "sdpa_flash", "xformers"):
        policy_with(model, wanted)
    with pytest.raises(UserError, match=r"engine.attention is xformers, .*norms train in fp32; write sdpa, or a model"):
        policy_with({**SD3, "dtype": "bf16"}, "xformers")
    policy_with({**SD3, "dtype": "bf16", "lora": {"rank": 2, "alpha": 4}}, "xformers")


def test_doctor_says_which_are_usable():
    told = dict(findings())["attention"]
    assert "sdpa" in told
    assert "pip install" in told
