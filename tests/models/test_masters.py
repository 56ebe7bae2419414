"""bf16 copies of fp32 masters: the bits of autocast, gradients in fp32,
and copies that follow wherever masters change.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_cases import save_checkpoint
from engine_cases import contents, succeed, tiny_recipe, write_lines
from flowgrove.models.experts import Experts
from flowgrove.models.folders import model_folder
from flowgrove.models.masters import Masters
from flowgrove.models.policy import Policy
from flowgrove.models.weights import Weights
from flowgrove.recipe.schema import Model
from flowgrove.run.checkpoint import load_checkpoint
from flowgrove.update.ema import Ema
from flowgrove.update.updater import Updater
from policy_cases import CPU, encoded, runner_of, small_recipe
from tiny_families import MODELS

FULL = {"adapter": "sd3", "path": "tiny", "dtype": "bf16", "gradient_checkpointing": False}
KINDS = {"full": {}, "lora": {"lora": {"rank": 4, "alpha": 8}}, "checkpointed": {"gradient_checkpointing": True}}


def policy_with(copies, **model):
    """With `copies` False, fp32 weights under autocast alone."""
    policy = Policy.load(small_recipe(model={**FULL, **model}), CPU, () if copies else None)
    if not copies:
        whole = Policy.load(small_recipe(model={**FULL, **model}), CPU)
        bare = policy.adapter
        adapter = type(bare)(bare.geometry, bare.transformer, whole.adapter.pipe, bare.folder)
        policy = replace(policy, adapter=adapter, encoder=whole.encoder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.weights.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    policy.weights.refresh()
    return policy


def passes(policy, count=2):
    """Velocity of the last of some training passes, and the gradients that they add up to."""
    generator = torch.Generator().manual_seed(0)
    prompts = encoded(policy)
    for _ in range(count):
        x = torch.randn(3, *policy.adapter.latent_shape, generator=generator)
        v = policy.velocity(x, torch.tensor([0.9, 0.5, 0.2]), prompts, torch.tensor([0, 1, 2])).v
        v.backward(torch.randn(v.shape, generator=generator).to(v.dtype))
    return v.detach(), {name: p.grad for name, p in policy.weights.trainable().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_velocities_and_gradients_have_the_bits_of_autocast(kind):
    (v, gradients), (expected, plain) = (passes(policy_with(copies, **KINDS[kind])) for copies in (True, False))
    assert torch.equal(v, expected)
    assert set(gradients) == set(plain)
    for name, gradient in gradients.items():
        assert (gradient is None) == (plain[name] is None)
        if gradient is not None:
            assert gradient.dtype == torch.float32
            assert torch.equal(gradient, plain[name]), name


def test_masters_are_fp32_and_what_the_passes_read_is_bf16():
    policy = policy_with(True)
    linear = {name for name, p in policy.transformer.named_parameters() if p.dtype == torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in policy.weights.trainable().values())
    assert len(linear) > 0.8 * len(policy.weights.trainable())
    held = sum(p.numel() for name, p in policy.transformer.named_parameters() if name in linear)
    assert held > 0.95 * sum(p.numel() for p in policy.transformer.parameters())
    passes(policy)
    assert all(p.grad is None for name, p in policy.transformer.named_parameters() if name in linear), (
        "no gradient is held twice"
    )


def test_copies_follow_updates_averages_and_checkpoints(tmp_path):
    recipe = small_recipe(model=FULL, update={"lr": 1e-2, "ema_decay": 0.5})
    policy = Policy.load(recipe, CPU)
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    assert isinstance(updater.ema, Ema)

    def in_step():
        params = dict(policy.transformer.named_parameters())
        return all(
            torch.equal(params[name].data, master.data.to(params[name].dtype))
            for name, master in policy.weights.trainable().items()
        )

    start = passes(policy)[0]
    save_checkpoint(tmp_path, policy, updater, 0, "recipe", 3, {})
    updater.step()
    assert in_step()
    moved = passes(policy)[0]
    assert not torch.equal(moved, start)
    with updater.ema.swapped_in():
        assert in_step()
        average = passes(policy)[0]
    assert not torch.equal(average, moved)
    assert in_step()
    assert torch.equal(passes(policy)[0], moved)
    load_checkpoint(tmp_path / "checkpoints" / "step_000000", policy, None)
    assert in_step()


def test_a_gradient_that_finds_no_room_does_not_count_twice(monkeypatch):
    """The hook fails once, as where memory runs out;
    what autograd left on the copy must not join the next attempt's gradient.
    """
    linear = torch.nn.Linear(3, 2, bias=False)
    masters = Masters(linear, torch.bfloat16)
    x, inner, calls = torch.ones(1, 3, dtype=torch.bfloat16), torch.Tensor.to, []

    def to(tensor, *args, **kwargs):
        if args and args[0] == torch.float32 and not calls:
            calls.append(1)
            raise torch.OutOfMemoryError("out of memory")
        return inner(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        linear(x).sum().backward()
    linear(x).sum().backward()
    assert calls
    assert torch.equal(masters.of["weight"].grad, torch.ones(2, 3))


def test_a_policy_in_fp32_computes_without_tf32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        Policy.load(small_recipe(model={**FULL, "dtype": "fp32"}), CPU)
        assert not matmul.allow_tf32
        assert not cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_small_updates_are_not_lost_to_rounding():
    """A weight of 1 that moves by 1e-4 a step stays 1 in bf16 for good, but not in its master."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(1.0)
    masters = Masters(linear, torch.bfloat16)
    for _ in range(100):
        with torch.no_grad():
            masters.of["weight"] += 1e-4
        masters.refresh()
    assert linear.weight.dtype == torch.bfloat16
    assert float(linear.weight.detach()) == pytest.approx(1.01, abs=4e-3)


def test_checkpoints_and_exports_hold_the_masters(tmp_path):
    path = tiny_recipe(tmp_path, model={"dtype": "bf16"}, run={"iterations": 1, "eval_every": 0})
    succeed("train", path, "--out", tmp_path / "run")
    succeed("export", tmp_path / "run", "--out", tmp_path / "pipeline")
    masters = load_file(next((tmp_path / "run" / "checkpoints").glob("*/weights.safetensors")))
    exported = load_file(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    assert all(torch.equal(exported[name], tensor) for name, tensor in masters.items())
    assert any(not torch.equal(tensor, tensor.to(torch.bfloat16).float()) for tensor in masters.values())


# A model that only draws


def written_in(dtype, source, folder):
    """A pipeline whose transformers' files hold `dtype`."""
    shutil.copytree(source, folder)
    for file in folder.glob("transformer*/*.safetensors"):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def held_bytes(module):
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def velocities(policy):
    """Of the model and of the reference model."""
    x, sigma = torch.randn(3, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0)), [0.9, 0.5, 0.2]
    policy = policy.of_expert("low" if isinstance(policy.transformer, Experts) else None)
    given = (x, torch.tensor(sigma), encoded(policy), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        own = policy.velocity(*given).v
        with policy.reference() as reference:  # a LoRA is off in it
            return [own, reference.velocity(*given).v]


ONLY_DRAWS = {
    "full": ("sd3", {}),
    "an expert": ("wan_a14b", {"trained_experts": "low"}),
    "lora": ("sd3", {"lora": {"rank": 4, "alpha": 8}}),
    "another family": ("flux", {}),
}


@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16], ids=["fp32 files", "bf16 files"])
@pytest.mark.parametrize("kind", ONLY_DRAWS)
def test_a_model_that_only_draws_has_the_bits_of_masters_and_nothing_twice(kind, files, folders, tmp_path):
    family, model = ONLY_DRAWS[kind]
    source = model_folder(Model(adapter="sd3", path="tiny")) if family == "sd3" else folders[family]
    model = {**MODELS.get(family, FULL), "path": str(written_in(files, source, tmp_path / "pipeline")), **model}
    recipe = small_recipe(model={**model, "dtype": "bf16"}, run={"eval": {"tuned_share": 0.5}})
    trains, draws = Policy.load(recipe, CPU), Policy.load(recipe, CPU, trains=False)
    expected = dict(trains.transformer.named_parameters())
    assert all(p.dtype == expected[name].dtype for name, p in draws.transformer.named_parameters())
    assert held_bytes(draws.transformer) == held_bytes(trains.transformer)
    assert not (draws.weights.trainable().keys() ^ trains.weights.trainable().keys())
    mine = {p.data_ptr() for p in draws.transformer.parameters()}
    assert all(p.data_ptr() in mine for p in draws.weights.trainable().values())
    before = velocities(trains)
    assert all(map(torch.equal, velocities(draws), before))
    generator = torch.Generator().manual_seed(1)
    trained = {
        name: p + 0.1 * torch.randn(p.shape, generator=generator) for name, p in trains.weights.trainable().items()
    }
    for policy in (trains, draws):
        policy.weights.load(trained)
    after = velocities(trains)
    assert all(map(torch.equal, velocities(draws), after))
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1]), "the reference model"


@pytest.mark.parametrize("model", [{}, {"lora": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])
def test_commands_that_draw_hold_no_masters_and_give_what_they_gave_with_them(model, tmp_path, monkeypatch):
    run = {"iterations": 1, "eval_every": 1, "eval": {"tuned_share": 0.5}, "keep_best": True}
    path = tiny_recipe(tmp_path, model={"dtype": "bf16", **model}, run=run, update={"lr": 1e-2, "ema_decay": 0.5})
    succeed("train", path, "--out", tmp_path / "run")
    prompts, found = write_lines(tmp_path / "prompts.txt", ["a red circle at the centre"]), []

    class Never(Masters):
        def __init__(self, *_):
            pytest.fail("a model that only draws has masters")

    for masters in (False, True):
        with monkeypatch.context() as patched:
            if masters:
                patched.setattr("flowgrove.models.policy.Weights", lambda *given: Weights(*given[:-1]))
            else:
                patched.setattr("flowgrove.models.weights.Masters", Never)
            for checkpoint in ((), ("--checkpoint", "best")):
                out = tmp_path / f"{masters} {len(checkpoint)}"
                succeed("sample", tmp_path / "run", "--prompts", prompts, "--out", out, "--compare", *checkpoint)
                succeed("eval", tmp_path / "run", *checkpoint)
                found.append((contents(out), (tmp_path / "run" / "eval.json").read_text()))
    assert found[:2] == found[2:]
    pictures = found[0][0]
    assert len(pictures) == 5
    assert pictures["0000_0.png"] != pictures["0000_0_base.png"]
