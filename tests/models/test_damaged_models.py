"""Model folders that are incomplete or damaged:
an error that names folder, part and tensor, no run on random weights.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_cases import refuse, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.models.folders import TINY
from flowgrove.models.parts import load_part, model_from_config
from flowgrove.models.policy import Policy
from policy_cases import CPU, TEXTS, small_recipe
from tiny_families import MODELS, write_pipeline

SD3 = {"adapter": "sd3", "height": 32, "width": 32}
TOKENIZERS = [
    ("sd3", "tokenizer"),
    ("sd3", "tokenizer_2"),
    ("sd3", "tokenizer_3"),
    ("flux", "tokenizer"),
    ("flux", "tokenizer_2"),
    ("qwen_image", "tokenizer"),
    ("wan", "tokenizer"),
]
PARTS = [
    *(("sd3", part) for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")),
    *(("flux", part) for part in ("text_encoder", "text_encoder_2", "transformer", "vae")),
    *((name, part) for name in ("qwen_image", "wan") for part in ("text_encoder", "transformer", "vae")),
]
STATISTICS = [
    ("sd3", "scaling_factor"),
    ("flux", "shift_factor"),
    ("qwen_image", "latents_mean"),
    ("wan", "latents_std"),
]


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: write_pipeline(name, root / name) for name in ("flux", "qwen_image", "wan")} | {"sd3": TINY}


@pytest.fixture
def copied(originals, tmp_path):
    """A pipeline folder that a test may damage."""

    def copy(name):
        return shutil.copytree(originals[name], tmp_path / "model")

    return copy


def refusal(name, folder, cache="none", **model):
    """The error of a policy on `folder`."""
    told = {**MODELS.get(name, SD3), "path": str(folder), "dtype": "fp32", **model}
    with pytest.raises(UserError) as caught:
        Policy.load(small_recipe(model=told, data={"prompts": "unused.txt", "embedding_cache": str(cache)}), CPU, TEXTS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_index(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("damage", ["vocabulary", "empty", "folder", "files", "named none"])
@pytest.mark.parametrize(("name", "part"), TOKENIZERS)
def test_a_tokenizer_that_is_not_whole_is_an_error(copied, name, part, damage):
    folder = copied(name)
    if damage == "vocabulary":
        (folder / part / "tokenizer.json").unlink()
    elif damage == "empty":
        (folder / part / "tokenizer.json").write_text("")
    elif damage == "folder":
        shutil.rmtree(folder / part)
    elif damage == "files":
        for file in (folder / part).iterdir():
            file.unlink()
    else:
        write_index(folder, **{part: [None, None]})
    assert part in refusal(name, folder)


def test_two_prompts_of_an_empty_vocabulary_are_not_sampled(copied, tmp_path):
    folder = copied("sd3")
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        (folder / part / "tokenizer.json").unlink()
    recipe = tiny_recipe(tmp_path, model={"path": str(folder)})
    told = refuse("train", recipe, "--out", tmp_path / "run")
    assert f"{folder / 'tokenizer'} holds a tokenizer without its vocabulary" in told


def test_a_tokenizer_that_knows_more_words_than_its_encoder_is_an_error(copied, originals):
    folder = copied("wan")
    shutil.copytree(originals["sd3"] / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    write_index(folder, tokenizer=["transformers", "CLIPTokenizer"])
    assert "gives the token" in refusal("wan", folder)


def test_one_word_beyond_the_encoder_is_an_error_though_the_first_texts_have_it_not(copied):
    folder = copied("sd3")
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"]["z</w>"] = 9999
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "gives the token 9999" in refusal("sd3", folder)


def test_sd3_without_t5_and_its_tokenizer_is_whole(copied):
    folder = copied("sd3")
    write_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    recipe = small_recipe(model={**SD3, "path": str(folder), "dtype": "fp32"})
    assert Policy.load(recipe, CPU, TEXTS).encode(TEXTS).cond.tensors["encoder_hidden_states"].abs().sum() > 0


def damage_tensors(folder, damage):
    """Returns the name of a tensor that the error may name."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    if damage == "half":
        tensors = {name: tensors[name] for name in names[::2]}
    elif damage == "one":
        untied = [name for name in names if "shared" not in name and "embed_tokens" not in name]
        del tensors[next(name for name in untied if name.endswith("weight"))]
    elif damage == "names":
        tensors = {f"foreign.{name}": tensor for name, tensor in tensors.items()}
    elif damage == "more":
        tensors["foreign.weight"] = torch.zeros(2)
    else:
        name = next(name for name in names if tensors[name].ndim > 1)
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", ["half", "one", "names", "more", "shape"])
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_weights_that_are_not_whole_are_an_error_that_names_part_and_tensor(copied, name, part, damage):
    folder = copied(name)
    damage_tensors(folder / part, damage)
    text = refusal(name, folder)
    assert str(folder / part) in text
    assert ".weight" in text or ".bias" in text or "pos_embed" in text or "scale_shift_table" in text


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_weights_that_are_not_whole_are_found_with_embeddings_on_disk_too(copied, tmp_path, part):
    folder = copied("flux")
    damage_tensors(folder / part, "half")
    assert str(folder / part) in refusal("flux", folder, tmp_path / "embeddings")


def old_clip(tensors):
    named = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    return {**named, "text_model.embeddings.position_ids": torch.arange(77)[None]}


def new_qwen(tensors):
    tops = {"model.": "model.language_model.", "visual.": "model.visual."}
    prefixes = {name: next((top for top in tops if name.startswith(top)), "") for name in tensors}
    return {tops.get(top, "") + name.removeprefix(top): tensors[name] for name, top in prefixes.items()}


@pytest.mark.parametrize(
    ("name", "part", "rename"),
    [
        ("flux", "text_encoder", old_clip),
        (
            "flux",
            "text_encoder_2",
            lambda tensors: {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]},
        ),
        ("flux", "text_encoder_2", lambda tensors: {**tensors, "decoder.final_layer_norm.weight": torch.zeros(3)}),
        ("wan", "text_encoder", lambda tensors: {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}),
        ("qwen_image", "text_encoder", new_qwen),
    ],
)
def test_names_of_published_files_are_whole(copied, originals, name, part, rename):
    """Tied weights twice, buffers that were stored once, and names that a library has changed since."""
    folder = copied(name)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = {key: tensor.clone() for key, tensor in rename(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    found, expected = (load_part(place, part, torch.float32).state_dict() for place in (folder, originals[name]))
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_pointers_of_variants_that_nobody_reads_are_left_alone(copied):
    folder = copied("flux")
    for part in ("text_encoder", "transformer", "tokenizer"):
        (folder / part / "model.fp16.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    Policy.load(small_recipe(model={**MODELS["flux"], "path": str(folder), "dtype": "fp32"}), CPU, TEXTS)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3", "transformer", "vae"])
def test_pointers_of_git_lfs_are_named(copied, part):
    folder = copied("sd3")
    (file,) = (folder / part).glob("*.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert f"{file} is a Git LFS pointer" in refusal("sd3", folder)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "nothing"])
def test_quantised_parts_without_their_library_are_one_line(copied, part, method):
    folder = copied("sd3")
    file = folder / part / "config.json"
    told = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": told}))
    assert str(folder / part) in refusal("sd3", folder)


def test_a_pickled_encoder_that_torch_refuses_is_one_line(copied):
    folder = copied("sd3")
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save({"weight": Foreign()}, folder / "text_encoder" / "pytorch_model.bin")
    text = refusal("sd3", folder)
    assert str(folder / "text_encoder") in text
    assert "pickle" in text


class Foreign:
    """What only a pickle that runs programs can bring back."""


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "tokenizer", "scheduler"])
@pytest.mark.parametrize(
    "named",
    [
        ["diffusers", "Nonesuch"],
        ["transformers", "Nonesuch"],
        ["elsewhere", "Model"],
        ["diffusers"],
        "DiffusionPipeline",
    ],
)
def test_a_wrong_class_in_the_index_is_one_line(copied, part, named):
    folder = copied("sd3")
    write_index(folder, **{part: named if isinstance(named, list) else ["diffusers", named]})
    assert part in refusal("sd3", folder)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '{"_class_name": ["pipeline", "Mine"]}', "[" * 100_000, "\0"])
def test_an_index_that_is_none_is_one_line(copied, content):
    folder = copied("sd3")
    (folder / "model_index.json").write_text(content)
    assert str(folder) in refusal("sd3", folder)


@pytest.mark.parametrize("place", ["", "model_index.json", "text_encoder", "tokenizer", "vae/config.json", "vae/loop"])
def test_loops_of_links_are_one_line_or_harmless(copied, tmp_path, place):
    folder = copied("sd3")
    link = folder / place
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(link)
    if place == "vae/loop":
        recipe = small_recipe(
            model={**SD3, "path": str(folder), "dtype": "fp32"},
            data={"prompts": "unused.txt", "embedding_cache": str(tmp_path / "kept")},
        )
        Policy.load(recipe, CPU, TEXTS).adapter.save_pipeline(tmp_path / "export")
        assert (tmp_path / "export" / "vae" / "config.json").is_file()
    else:
        assert str(folder) in refusal("sd3", folder)


@pytest.mark.parametrize("longest", [0, 78, 2**40, 10**30, "77"])
def test_a_tokenizer_that_pads_to_more_than_its_encoder_reads_is_one_line(copied, longest):
    folder = copied("flux")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": longest}))
    assert str(folder / "tokenizer") in refusal("flux", folder)


@pytest.mark.parametrize("longest", [0, -1, "77", True, [1]])
@pytest.mark.parametrize("name", ["qwen_image", "wan"])
def test_a_tokenizer_that_reads_less_than_a_word_is_one_line(copied, name, longest):
    folder = copied(name)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": longest}))
    assert str(folder / "tokenizer") in refusal(name, folder)


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("named", ["Nonesuch", "AutoencoderKLWan", "FluxTransformer2DModel", None])
def test_a_plan_of_memory_names_the_wrong_class(copied, tmp_path, part, named):
    folder = copied("sd3")
    write_index(folder, **{part: ["diffusers", named] if named else [None, None]})
    recipe = tiny_recipe(tmp_path, model={"path": str(folder)})
    assert part in refuse("plan", recipe, "--memory")


@pytest.mark.parametrize("content", [None, "", "[]", '{"_class_name": "Nonesuch"}', '{"num_layers": "three"}'])
def test_a_plan_of_memory_over_a_damaged_configuration_is_one_line(copied, tmp_path, content):
    folder = copied("sd3")
    file = folder / "vae" / "config.json"
    file.unlink() if content is None else file.write_text(content)
    recipe = tiny_recipe(tmp_path, model={"path": str(folder)})
    assert str(folder) in refuse("plan", recipe, "--memory")


ENDLESS = [
    ("sd3", "transformer", "num_layers", 2**40),
    ("flux", "transformer", "num_single_layers", 1e12),
    ("qwen_image", "text_encoder", "num_hidden_layers", 2**40),
    ("qwen_image", "vae", "num_res_blocks", 2**40),
    ("sd3", "vae", "layers_per_block", [2, 2**40]),
]


@pytest.mark.parametrize(("name", "part", "key", "count"), ENDLESS)
def test_a_model_without_an_end_is_not_built(copied, name, part, key, count):
    folder = copied(name)
    file = folder / part / "config.json"
    settings = json.loads(file.read_text())
    inner = settings if key in settings else settings["text_config"]
    inner[key] = count
    file.write_text(json.dumps(settings))
    wanted = rf"{part}/config.json says {key} .*, which no model has: download the file anew"
    with pytest.raises(UserError, match=wanted):
        load_part(folder, part, torch.float32)
    with pytest.raises(UserError, match=wanted):
        model_from_config(folder, part)


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"", b"abc"])
def test_a_damaged_cache_of_the_hub_is_one_line(tmp_path, monkeypatch, content):
    reference = tmp_path / "models--owner--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = tiny_recipe(tmp_path, model={"path": "owner/name"}, rollout={"shift": None})
    assert "hf download owner/name" in refuse("plan", recipe)


@pytest.mark.parametrize("value", [None, float("nan"), "0.1", [0.1], {}])
@pytest.mark.parametrize(("name", "key"), STATISTICS)
def test_a_vae_without_the_numbers_of_its_latents_is_one_line(copied, name, key, value):
    folder = copied(name)
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert str(folder / "vae") in refusal(name, folder)
