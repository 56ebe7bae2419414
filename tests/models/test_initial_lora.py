"""model.init_lora: files in the ways that other programs name LoRA layers, merged into the weights or trained on."""

import json
import re
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from engine_cases import metrics_of, refuse, succeed, tiny_recipe, weights_of
from flowgrove.errors import UserError
from flowgrove.models.families import family_of
from flowgrove.models.folders import ARCHITECTURES, TINY
from flowgrove.models.initial_lora import InitialLora, check_initial_lora
from flowgrove.models.lora_files import write_lora
from flowgrove.models.lora_reading import read_lora
from flowgrove.models.parts import model_from_config
from flowgrove.models.policy import Policy
from flowgrove.plan.memory import MemoryModel
from flowgrove.plan.planner import make_plan
from flowgrove.recipe.schema import InitLora, Lora
from policy_cases import CPU, encoded, small_recipe

LORA = Lora(rank=2, alpha=6)
FOLDERS = {"sd3": TINY, **{name: ARCHITECTURES / folder for name, folder in (
    ("flux", "flux1_dev"), ("qwen_image", "qwen_image"), ("wan", "wan21_1_3b"))}}  # fmt: skip


@cache
def unloaded(name):
    with torch.device("meta"):
        return model_from_config(FOLDERS[name], "transformer")


def random_layers(transformer, targets, rank=2, blocks=2, seed=0):
    """{module: (A, B)} for the targets in the first blocks, as whole numbers that every float format holds."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, part in transformer.named_modules():
        number = re.search(r"\.(\d+)\.", name)
        if name.endswith(tuple(targets)) and number and int(number[1]) < blocks:
            shapes = (rank, part.in_features), (part.out_features, rank)
            layers[name] = tuple(torch.randint(-4, 5, shape, generator=generator) / 16 for shape in shapes)
    return layers


def named_by_peft(layers):
    halves = ((f"{name}.lora_{half}.weight", one) for name, two in layers.items() for half, one in zip("AB", two))  # noqa: B905
    return dict(halves)


def written(way, name, layers, folder):
    """A file of the layers, whose change of the weights is alpha / rank = 3 times B A."""
    folder.mkdir(parents=True, exist_ok=True)
    named, family = named_by_peft(layers), family_of(name)
    if way in ("diffusers", "comfyui"):
        write_lora(folder / way, way, named, LORA, family)
        return next((folder / way).iterdir())
    if way == "peft":
        save_file(
            {f"base_model.model.{key}": tensor for key, tensor in named.items()}, folder / "adapter_model.safetensors"
        )
        told = LoraConfig(r=2, lora_alpha=6, target_modules=["x"]).to_dict() | {"target_modules": ["x"]}
        (folder / "adapter_config.json").write_text(json.dumps(told, default=str), encoding="utf-8")
        return folder / "adapter_model.safetensors"
    flat = {}
    for module, (a, b) in layers.items():
        place = f"lora_unet_{module.replace('.', '_')}"
        flat |= {f"{place}.lora_down.weight": a, f"{place}.lora_up.weight": b, f"{place}.alpha": torch.tensor(6.0)}
    save_file(flat, folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


@pytest.mark.parametrize("way", ["diffusers", "comfyui", "peft", "kohya"])
@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_file_of_every_way_of_naming_holds_the_same_layers(name, way, tmp_path):
    transformer = unloaded(name)
    layers = random_layers(transformer, family_of(name).lora_targets[:4], blocks=1)
    linear = [module for module, part in transformer.named_modules() if isinstance(part, torch.nn.Linear)]
    found = read_lora(written(way, name, layers, tmp_path), family_of(name), linear)
    assert found.keys() == layers.keys()
    for module, (a, b) in layers.items():
        assert torch.equal(found[module].scale * found[module].b[:9] @ found[module].a, 3 * b[:9] @ a)


def test_layers_of_fused_projections_are_divided(tmp_path):
    """kohya's scripts adapt FLUX as its authors wrote it, whose queries, keys and values are one product."""
    size, generator = 3072, torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, shape, generator=generator) / 16 for shape in ((4, size), (3 * size, 4)))
    place = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{place}.lora_down.weight": a, f"{place}.lora_up.weight": b, f"{place}.alpha": torch.tensor(8.0)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    said = InitLora(path=str(tmp_path / "kohya.safetensors"), merge=True, strength=0.5)
    found = InitialLora(said, family_of("flux"), unloaded("flux")).layers
    assert sorted(found) == [f"transformer_blocks.0.attn.to_{one}" for one in "kqv"]
    rows = dict(zip("qkv", b.split(size), strict=True))
    for name, layer in found.items():
        assert torch.equal(layer.scale * layer.b[:9] @ layer.a, rows[name[-1]][:9] @ a)  # half of alpha / rank


MODEL = {"adapter": "sd3", "path": "tiny", "dtype": "fp32", "gradient_checkpointing": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A LoRA of the tiny model's attention, of rank 2 and scale 3."""
    layers = random_layers(unloaded("sd3"), family_of("sd3").lora_targets, blocks=9)
    return written("kohya", "sd3", layers, tmp_path_factory.mktemp("lora"))


def model_of(file, **changes):
    return {**MODEL, "init_lora": {"path": str(file)}, "lora": {"rank": 2, "alpha": 4}, **changes}


def velocity(policy):
    x = torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v


@pytest.fixture(scope="module")
def by_diffusers(file):
    """What the tiny model draws without the file, and with it as diffusers loads it."""
    policy = Policy.load(small_recipe(model=MODEL), CPU)
    base = velocity(policy)
    named = {}
    for key, tensor in load_file(file).items():  # SD3's loader has no converter
        if not key.endswith("alpha"):
            module, half = key.removeprefix("lora_unet_").removesuffix(".weight").rsplit(".", 1)
            (module,) = (m for m in policy.transformer.state_dict() if m.replace(".", "_") == f"{module}_weight")
            name = f"transformer.{module.removesuffix('.weight')}.lora_{'A' if half == 'lora_down' else 'B'}.weight"
            named[name] = tensor * (3 if half == "lora_up" else 1)
    policy.adapter.pipe.load_lora_weights(named)
    return base, velocity(policy)


@pytest.mark.parametrize("model", [{}, {"init_lora": "merge"}, {"init_lora": "merge", "lora": None}])
def test_a_run_starts_from_what_diffusers_draws_with_the_file(model, file, by_diffusers):
    base, expected = by_diffusers
    if model:
        model = {**model, "init_lora": {"path": str(file), "merge": True}}
    policy = Policy.load(small_recipe(model=model_of(file, **model)), CPU)
    assert (velocity(policy) - expected).abs().max() < 1e-5
    assert (base - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "merge"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_the_reference_model_is_the_one_that_training_started_with(dtype, merge, file):
    initial = {"path": str(file), "merge": merge}
    recipe = small_recipe(model=model_of(file, dtype=dtype, init_lora=initial), update={"kl_weight": 0.1})
    policy = Policy.load(recipe, CPU)
    started, weights = velocity(policy), policy.weights
    weights.load({name: p + 0.5 for name, p in weights.trainable().items()})
    moved = velocity(policy)
    assert not torch.equal(moved, started)
    if not merge:
        held = sum(tensor.nbytes for tensor in weights.initial.values())
        assert MemoryModel(recipe, make_plan(recipe, 0), "cpu").resident(4096)["untouched copy"] == held > 0
    for _ in range(2):
        with policy.reference() as reference:
            assert torch.equal(velocity(reference), started)
            assert reference.weights_in_use != policy.weights_in_use
        assert torch.equal(velocity(policy), moved)


def test_merging_adds_the_product_to_the_weights(file):
    transformer = model_from_config(TINY, "transformer").to(torch.bfloat16)
    plain, tensors = {key: weight.clone() for key, weight in transformer.state_dict().items()}, load_file(file)
    initial = InitialLora(InitLora(path=str(file), merge=True, strength=0.5), family_of("sd3"), transformer)
    initial.merge(transformer)
    for key, weight in transformer.state_dict().items():
        flat = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        change = torch.zeros(())
        if key.endswith(".weight") and f"{flat}.alpha" in tensors:
            change = 0.5 * 3 * tensors[f"{flat}.lora_up.weight"] @ tensors[f"{flat}.lora_down.weight"]
        assert torch.equal(weight, (plain[key].float() + change).to(torch.bfloat16))


@pytest.mark.long
def test_a_second_run_draws_what_the_first_ended_with_and_exports_the_whole_lora(tmp_path):
    lora, one = {"rank": 2, "alpha": 4}, {"iterations": 1, "eval_every": 1}
    common = {"update": {"lr": 0.3, "kl_weight": 0.1}, "rollout": {"group_size": 2}, "run": one}
    first = tiny_recipe(tmp_path / "first", model={"lora": lora}, **common)
    succeed("train", first, "--out", tmp_path / "run1")
    succeed("export", tmp_path / "run1", "--out", tmp_path / "lora")
    told = {"lora": {"rank": 2, "alpha": 1}, "init_lora": {"path": "../lora"}}
    second = tiny_recipe(tmp_path / "second", model=told, **common)
    succeed("train", second, "--out", tmp_path / "run2")
    pictures = [tmp_path / run / "samples" / f"iteration_{n:06d}.png" for run, n in (("run1", 1), ("run2", 0))]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert metrics_of(tmp_path / "run2")[0]["approx_kl"] >= 0
    succeed("export", tmp_path / "run2", "--out", tmp_path / "lora2")
    (exported,) = (load_file(path) for path in (tmp_path / "lora2").iterdir())
    trained = weights_of(tmp_path / "run2", 1)
    assert len(exported) == len(trained) > 0
    for name, tensor in exported.items():
        master = trained[name.removeprefix("transformer.").replace(".weight", ".default.weight")]
        assert torch.allclose(tensor, master * (0.5 if "lora_B" in name else 1))

    state = json.loads((tmp_path / "run2" / "checkpoints" / "step_000001" / "state.json").read_text(encoding="utf-8"))
    assert len(state["initial_lora"]) == 64
    longer = ("--set", "run.iterations=2", "--out", tmp_path / "run2")
    (path,) = (tmp_path / "lora").iterdir()
    content = path.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    assert "holds another LoRA than" in refuse("train", second, *longer)
    path.write_bytes(content)
    succeed("train", second, *longer)
    assert len(metrics_of(tmp_path / "run2")) == 2


def test_what_does_not_fit_is_one_line_before_a_model_is_loaded(file, tmp_path, monkeypatch):
    monkeypatch.setattr("flowgrove.trainer.Policy.load_together", lambda *_: pytest.fail("a model is loaded"))
    tensors = load_file(file)
    module = next(key for key in tensors if key.endswith("to_q.alpha")).removesuffix(".alpha")
    named = module.removeprefix("lora_unet_transformer_blocks_")

    def without(end):
        return {key: tensor for key, tensor in tensors.items() if not key.startswith(module) or not key.endswith(end)}

    lora, foreign = {"rank": 2, "alpha": 4}, {"lora_unet_mid.lora_up.weight": torch.ones(2, 2)}
    changed = {
        "rank": (tensors, {"lora": {"rank": 8, "alpha": 8}}, "rank is 8, and .* has rank 2 .*: write model.lora.rank"),
        "targets": (tensors, {"lora": {**lora, "targets": ["attn.to_q"]}}, "a layer for .*: write model.lora.targets"),
        "missing": (without(""), {}, "adapts .* modules, and .* has no layer for transformer_blocks"),
        "half": (without("lora_up.weight"), {}, r"holds a lora_A of .* and no lora_B"),
        "foreign": ({**tensors, **foreign}, {}, "lora_unet_mid.*no LoRA layer of this StableDiffusion3Pipeline"),
        "shape": ({**tensors, f"{module}.lora_down.weight": torch.ones(2, 3)}, {}, r"× \[2, 3\] for .*whose weight is"),
        "text": ({**tensors, "lora_te1_x.lora_up.weight": torch.ones(2, 2)}, {}, "lora_te1_x.*of a text encoder"),
        "dora": ({**tensors, f"{module}.dora_scale": torch.ones(2)}, {}, "dora_scale"),
        "none": ({}, {}, "no LoRA layers"),
        "null": (tensors, {"lora": None}, "model.lora is null: write model.init_lora.merge: true"),
    }  # fmt: skip
    for name, (content, model, message) in changed.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        recipe = tiny_recipe(tmp_path / name, model=model_of(tmp_path / f"{name}.safetensors", **model))
        told = refuse("train", recipe, "--out", tmp_path / "run")
        assert re.search(message, told), told
    assert named in refuse("train", tmp_path / "half" / "mine.yaml", "--out", tmp_path / "run").replace(".", "_")


def test_a_path_without_a_lora_says_what_to_give(file, tmp_path):
    def refused(path):
        with pytest.raises(UserError) as error:
            check_initial_lora(small_recipe(model=model_of(path)).model)
        return str(error.value)

    assert "there is no" in refused(tmp_path / "nowhere")
    assert "holds no .safetensors file" in refused(tmp_path)
    for name in ("one", "two"):
        save_file(load_file(file), tmp_path / f"{name}.safetensors")
    assert "holds 2 .safetensors files" in refused(tmp_path)
    (tmp_path / "pickle.pt").write_bytes(b"")
    assert "convert it" in refused(tmp_path / "pickle.pt")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:100])
    assert "get the file anew" in refused(tmp_path / "half.safetensors")


def test_peft_writes_what_is_read(tmp_path):
    """A folder as peft's own functions name and write it, with the alpha in its settings."""
    policy = Policy.load(small_recipe(model={**MODEL, "lora": {"rank": 2, "alpha": 8}}), CPU)
    policy.weights.load({name: torch.full_like(p, 0.25) for name, p in policy.weights.trainable().items()})
    expected = velocity(policy)
    named = {f"base_model.model.{key}": one for key, one in get_peft_model_state_dict(policy.transformer).items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    policy.transformer.peft_config["default"].save_pretrained(tmp_path)
    again = Policy.load(small_recipe(model=model_of(tmp_path)), CPU)
    assert torch.allclose(velocity(again), expected, atol=1e-6)
