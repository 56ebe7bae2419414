"""`flowgrove export`: LoRA files at full strength for loaders that take alpha = rank, ComfyUI's names, and dtypes."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine_cases import TRAIN_PROMPTS, refuse, succeed, tiny_recipe, weights_of
from flowgrove.errors import UserError
from flowgrove.models.families import family_of
from flowgrove.models.folders import TINY
from flowgrove.models.lora_files import COMFYUI_FILE, comfyui_name
from flowgrove.models.policy import Policy
from policy_cases import CPU, encoded, small_recipe
from tiny_families import FAMILIES, MODELS, sampled

LORA = {"rank": 4, "alpha": 12}
# test_experts.py has two files, test_hunyuan_video15.py one that no pipeline loads
WITH_ONE_FILE = [name for name in ("sd3", *FAMILIES) if not name.endswith(("a14b", "hunyuan_video15"))]


@pytest.fixture(scope="session")
def runs(folders, tmp_path_factory):
    """A run of one iteration with a LoRA whose B is not zero, and its base model in a folder of its own."""

    def run(name, **model):
        place = tmp_path_factory.mktemp(name)
        base = shutil.copytree(TINY if name == "sd3" else folders[name], place / "base")
        told = {**MODELS.get(name, {"adapter": "sd3"}), "path": str(base), "lora": LORA, **model}
        data = {"eval_prompts": None}
        if name in FAMILIES:
            data["prompts"] = FAMILIES[name].write_prompts(place / "mine", TRAIN_PROMPTS).name
        recipe = tiny_recipe(
            place, model=told, reward=[{"name": "jpeg_size"}], update={"lr": 0.3}, data=data,
            run={"iterations": 1, "eval_every": 0}, rollout={"group_size": 2},
        )  # fmt: skip
        succeed("train", recipe, "--out", place / "run")
        return place / "run"

    return run


def pass_of(policy):
    x = torch.randn(2, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.7, 0.3]), encoded(policy), torch.tensor([0, 1])).v


def plain_policy(name, folder):
    return Policy.load(
        small_recipe(model={**MODELS.get(name, {"adapter": "sd3"}), "path": str(folder), "dtype": "fp32"}), CPU
    )


def trained_velocity(name, folder, run):
    policy = Policy.load(
        small_recipe(
            model={**MODELS.get(name, {"adapter": "sd3"}), "path": str(folder), "dtype": "fp32", "lora": LORA}
        ),
        CPU,
    )
    weights = weights_of(run, 1)
    for key, parameter in policy.weights.trainable().items():
        parameter.data.copy_(weights[key])
    return pass_of(policy)


WAN_NAMES = {
    "attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
    "add_k_proj": "k_img", "add_v_proj": "v_img",
}  # fmt: skip


def asked_by_comfyui(name, module):
    """Under what name ComfyUI's loader looks for a layer on a module of diffusers' blocks
    (comfy/lora.py, comfy/utils.py).
    """
    if name.startswith("ltx"):
        return f"diffusion_model.{module}"
    if not name.startswith("wan"):
        return f"transformer.{module}"
    block, number, attention, layer = module.split(".", 3)
    return f"diffusion_model.{block}.{number}.{WAN_NAMES[attention]}.{WAN_NAMES[layer]}"


def comfyui_patches(name, file, modules):
    """{module: alpha / rank · up · down} of a file, as ComfyUI finds layers. Every key must be one that it asks for."""
    lora, used, patches = load_file(file), set(), {}
    for module in modules:
        asked = asked_by_comfyui(name, module)
        up, down, alpha = (f"{asked}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up in lora:
            used |= {up, down, alpha} & lora.keys()
            scale = lora[alpha].item() / lora[down].shape[0] if alpha in lora else 1.0
            patches[module] = scale * (lora[up] @ lora[down])
    assert used == set(lora)
    return patches


@pytest.mark.parametrize("name", sampled("sd3", "flux", "qwen_image", "wan", names=WITH_ONE_FILE))
def test_a_lora_draws_the_same_in_every_loader_and_needs_no_base_model(folders, runs, tmp_path, name):
    run = runs(name)
    shutil.rmtree(run.parent / "base")
    succeed("export", run, "--out", tmp_path / "lora")
    expected, base = trained_velocity(name, folders[name], run), plain_policy(name, folders[name])
    untouched = pass_of(base)
    assert (untouched - expected).abs().max() > 1e-2

    def close(found):
        return (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())

    (file,) = (tmp_path / "lora").iterdir()
    tensors = load_file(file)
    with safe_open(file, "pt") as content:
        settings = json.loads(content.metadata()["lora_adapter_metadata"])
    assert settings["transformer.r"] == settings["transformer.lora_alpha"] == LORA["rank"]
    base.adapter.pipe.load_lora_weights(tmp_path / "lora")
    assert close(pass_of(base)), "diffusers"

    bare = tmp_path / "bare"
    bare.mkdir()
    save_file(tensors, bare / "pytorch_lora_weights.safetensors")
    unknowing = plain_policy(name, folders[name])
    unknowing.adapter.pipe.load_lora_weights(bare)
    assert close(pass_of(unknowing)), "a loader that knows no alpha"

    patched = plain_policy(name, folders[name])
    if patched.adapter.comfyui_name("transformer_blocks.0.attn.to_q") is None and name == "qwen_image21":
        assert "ComfyUI has no name" in refuse("export", run, "--out", tmp_path / "comfyui", "--format", "comfyui")
        return
    assert COMFYUI_FILE in succeed("export", run, "--out", tmp_path / "comfyui", "--format", "comfyui").stderr
    layers = {
        module: layer
        for module, layer in patched.transformer.named_modules()
        if re.search(r"(blocks|layers|refiner).*(attn\d?|attention)\.", module)
    }
    linear = [module for module, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
    patches = comfyui_patches(name, tmp_path / "comfyui" / COMFYUI_FILE, linear)
    assert len(patches) == len(tensors) // 2
    with torch.no_grad():
        for module, patch in patches.items():
            layers[module].weight += patch
    assert close(pass_of(patched)), "ComfyUI"
    if name.startswith("wan") and name != "wan_vace":  # diffusers reads Wan's own names too, but for VACE's blocks
        theirs = plain_policy(name, folders[name])
        theirs.adapter.pipe.load_lora_weights(tmp_path / "comfyui", weight_name=COMFYUI_FILE)
        assert close(pass_of(theirs))


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        (
            "sd3",
            "transformer_blocks.3.ff_context.net.0.proj",
            "transformer.transformer_blocks.3.ff_context.net.0.proj",
        ),
        ("sd3", "transformer_blocks.3.attn2.to_q", "transformer.transformer_blocks.3.attn2.to_q"),
        ("flux", "single_transformer_blocks.3.proj_mlp", "transformer.single_transformer_blocks.3.proj_mlp"),
        (
            "flux",
            "transformer_blocks.3.norm1_context.linear",
            "transformer.transformer_blocks.3.norm1_context.linear",
        ),
        ("qwen_image", "transformer_blocks.3.img_mlp.net.2", "transformer.transformer_blocks.3.img_mlp.net.2"),
        ("z_image", "layers.3.feed_forward.w2", "transformer.layers.3.feed_forward.w2"),
        ("z_image", "all_final_layer.2-1.linear", "transformer.all_final_layer.2-1.linear"),
        ("ltx", "transformer_blocks.3.ff.net.0.proj", "diffusion_model.transformer_blocks.3.ff.net.0.proj"),
        ("ltx", "proj_in", "diffusion_model.patchify_proj"),
        ("ltx", "time_embed.linear", "diffusion_model.adaln_single.linear"),
        ("wan", "blocks.3.ffn.net.0.proj", "diffusion_model.blocks.3.ffn.0"),
        ("wan", "blocks.3.attn2.to_out.0", "diffusion_model.blocks.3.cross_attn.o"),
        ("wan", "condition_embedder.time_proj", "diffusion_model.time_projection.1"),
        ("wan", "proj_out", "diffusion_model.head.head"),
    ],
)
def test_comfyui_names_of_other_targets(family, module, expected):
    assert comfyui_name(family_of(family), module) == expected


def test_a_layer_that_comfyui_does_not_know_is_an_error():
    with pytest.raises(UserError, match=r"ComfyUI has no name for the layer on blocks.3.other"):
        comfyui_name(family_of("wan"), "blocks.3.other")
    with pytest.raises(UserError, match=r"--format diffusers"):
        comfyui_name(family_of("flux"), "transformer_blocks.3.other")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_a_lora_takes_the_dtype_that_is_asked_for(runs, tmp_path, form, dtype):
    run = runs("sd3")
    succeed("export", run, "--out", tmp_path / "lora", "--format", form, "--dtype", dtype)
    (file,) = (tmp_path / "lora").iterdir()
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for name, tensor in load_file(file).items() if not name.endswith("alpha")} == {expected}


def transformer_of(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    return load_file(file)


def test_a_pipeline_takes_the_dtype_that_is_asked_for_and_keeps_what_its_class_keeps(runs, tmp_path):
    run = runs("wan", lora=None)
    for dtype, expected in (("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)):
        out = tmp_path / str(dtype)
        succeed("export", run, "--out", out, *(("--dtype", dtype) if dtype else ()))
        tensors = transformer_of(out)
        assert tensors["blocks.0.attn1.to_q.weight"].dtype == expected
        assert tensors["scale_shift_table"].dtype == torch.float32
        assert all(torch.equal(tensor, weights_of(run, 1)[name].to(tensor.dtype)) for name, tensor in tensors.items())
        FAMILIES["wan"].pipeline.from_pretrained(out)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_bf16_run_over_bf16_files_exports_bf16(folders, tmp_path, dtype, expected):
    base = shutil.copytree(TINY, tmp_path / "base")
    (file,) = (base / "transformer").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    recipe = tiny_recipe(
        tmp_path,
        model={"path": str(base), "dtype": dtype},
        run={"iterations": 1, "eval_every": 0},
        rollout={"group_size": 2},
    )
    succeed("train", recipe, "--out", tmp_path / "run")
    succeed("export", tmp_path / "run", "--out", tmp_path / "out")
    assert {tensor.dtype for tensor in transformer_of(tmp_path / "out").values()} == {expected}


def test_what_export_cannot_write_is_one_line(runs, tmp_path):
    run, out = runs("sd3"), ("--out", tmp_path / "out")
    assert "--format is onnx: write diffusers or comfyui" in refuse("export", run, *out, "--format", "onnx")
    assert "--dtype is int8: write bf16, fp16 or fp32" in refuse("export", run, *out, "--dtype", "int8")
    whole = runs("sd3", lora=None)
    assert "--format comfyui is for a LoRA" in refuse("export", whole, *out, "--format", "comfyui")
    assert "other weights than its recipe.yaml trains" in refuse("export", run, *out, "--set", "model.lora.rank=3")
    assert not (tmp_path / "out").exists()


def test_numbers_that_fp16_cannot_hold_are_an_error(folders, tmp_path):
    policy = plain_policy("sd3", folders["sd3"])
    with torch.no_grad():
        next(iter(policy.weights.trainable().values())).fill_(1e6)
    dtypes = dict.fromkeys(policy.transformer.state_dict(), torch.float16)
    with pytest.raises(UserError, match="too large for float16: write bf16 or fp32"):
        policy.adapter.save_pipeline(tmp_path / "out", dtypes)
    assert next(iter(policy.weights.trainable().values())).dtype == torch.float32
