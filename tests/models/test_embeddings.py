"""Prompts on disk: encoded once, read back as they were, with the text encoders out of memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_cases import contents, succeed, tiny_recipe, weights_of, write_lines
from flowgrove.errors import UserError
from flowgrove.models import embeddings, loading
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.families import family_names, family_of
from flowgrove.models.loading import encode_together
from flowgrove.models.policy import Policy
from flowgrove.ranks import Ranks
from flowgrove.recipe.loading import load_recipe
from policy_cases import CPU, TEXTS, encoded, small_recipe
from tiny_families import FAMILIES, MODELS, sampled

PROMPTS = [*TEXTS, "", "a red circle " * 40]


def recipe_of(folders, name, cache, **model):
    told = {**MODELS.get(name, {"adapter": "sd3"}), "path": str(folders[name]), "dtype": "fp32", **model}
    return small_recipe(model=told, data={"prompts": "unused.txt", "embedding_cache": str(cache)})


@pytest.fixture
def encodings(monkeypatch):
    """The texts of every call of an adapter's own encoders."""
    calls = []

    def counted(kind):
        encode = kind.encode

        def wrapper(self, texts):
            calls.append(list(texts))
            return encode(self, texts)

        monkeypatch.setattr(kind, "encode", wrapper)

    for name in family_names():
        counted(family_of(name))
    return calls


def prompts_of(name, texts):
    return FAMILIES[name].prompts(texts) if name in FAMILIES else texts


@pytest.mark.parametrize("name", sampled())
@torch.no_grad()
def test_embeddings_from_disk_equal_those_of_the_encoders(folders, tmp_path, name):
    loaded = encoded(Policy.load(recipe_of(folders, name, "none"), CPU), PROMPTS).cond
    stored = encoded(Policy.load(recipe_of(folders, name, tmp_path), CPU), PROMPTS).cond
    assert stored.tensors.keys() == loaded.tensors.keys()
    for key, tensor in loaded.tensors.items():
        assert tensor.dtype == stored.tensors[key].dtype
        assert torch.equal(tensor, stored.tensors[key]), key


@pytest.mark.parametrize("name", sampled("sd3", "qwen_image"))
def test_bits_on_disk_depend_on_the_text_alone(folders, tmp_path, name):
    texts = [*PROMPTS, *(f"{text} {number}" for text in TEXTS for number in range(6))]
    many, away = prompts_of(name, texts), family_of(MODELS.get(name, {"adapter": "sd3"})["adapter"]).uncond_text
    Policy.load(recipe_of(folders, name, tmp_path / "whole"), CPU, many)
    for some in (many[:4], many[3:9], many):  # as runs that were killed while they prepared
        Policy.load(recipe_of(folders, name, tmp_path / "pieces"), CPU, some)
    whole, pieces = (contents(tmp_path / kept) for kept in ("whole", "pieces"))
    assert len(whole) == len(
        set(many) if many != texts else {*many, away}
    )  # the unconditional one where it may be used
    assert whole == pieces


def test_a_run_that_was_killed_while_it_prepared_ends_in_the_same_weights(folders, tmp_path):
    prompts = [
        f"a {colour} {shape} number {number}"
        for colour in ("red", "blue")
        for shape in ("circle", "cross")
        for number in range(5)
    ]
    model = {**MODELS["flux_schnell"], "path": str(folders["flux_schnell"]), "guidance_scale": 2.0}
    ends = []
    for name, kept in (("whole", None), ("killed", 4)):
        recipe = tiny_recipe(
            tmp_path / name, data={"embedding_cache": str(tmp_path / name / "embeddings")},
            run={"iterations": 2, "eval_every": 0}, model=model, reward=[{"name": "jpeg_size"}],
        )  # fmt: skip
        write_lines(recipe.parent / "train.txt", prompts)
        if kept is not None:
            Policy.load(load_recipe(recipe), CPU, prompts[5 : 5 + kept])
        succeed("train", recipe, "--out", tmp_path / name / "run")
        ends.append(weights_of(tmp_path / name / "run", 2))
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("name", sampled())
def test_text_encoders_are_not_in_memory_after_their_work(folders, tmp_path, name):
    prompts = prompts_of(name, PROMPTS)
    policy = Policy.load(recipe_of(folders, name, tmp_path, guidance_scale=2.0), CPU, prompts)
    parts = policy.adapter.pipe.components
    gone = set(policy.adapter.TEXT) - set(policy.adapter.ALWAYS)
    assert all(parts[part] is None for part in gone)
    policy.encode(prompts)
    assert all(parts[part] is None for part in gone)
    assert policy.encode([prompts[0], prompts[0]]).cond.tensors["encoder_hidden_states"].shape[0] == 2


def test_each_text_is_encoded_once_in_all_runs_of_a_model(folders, tmp_path, encodings):
    recipe = recipe_of(folders, "flux", tmp_path)
    Policy.load(recipe, CPU, [*TEXTS, *TEXTS, ""])
    assert encodings == [[text] for text in (*TEXTS, "")]
    Policy.load(recipe, CPU, TEXTS).encode([*reversed(TEXTS), "a new one"])
    assert encodings == [[text] for text in (*TEXTS, "", "a new one")]


class Apart(Ranks):
    """One of several ranks whose others store nothing where this one looks."""

    def together(self, work):
        return work()

    def most(self, number):
        return number


@pytest.mark.parametrize(("here", "at_first", "left"), [(1, 3, 0), (2, 3, 4)])
def test_ranks_without_a_common_folder_encode_what_their_machine_lacks(
    folders, tmp_path, encodings, monkeypatch, here, at_first, left
):
    """Rank 2 of 4: its quarter, then its machine's share of the rest, and at the end whatever nobody has stored."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("LOCAL_RANK", str(here - 1))
    recipe, many = recipe_of(folders, "flux", tmp_path), [f"a red circle {number}" for number in range(11)]
    wanted = [[text] for text in (*many, "")]
    encode_together(recipe, CPU, torch.float32, many, Apart(2, 4))
    assert encodings[:at_first] == wanted[6:9]
    assert len(wanted) - len(encodings) == left
    policy = Policy.load(recipe, CPU, many)
    assert sorted(encodings) == sorted(wanted)
    policy.encode(many)
    assert len(encodings) == len(wanted)


def test_another_text_length_or_precision_or_encoder_has_files_of_its_own(folders, tmp_path, encodings):
    Policy.load(recipe_of(folders, "flux", tmp_path), CPU, TEXTS)
    Policy.load(recipe_of(folders, "flux", tmp_path, text_tokens=7), CPU, TEXTS)
    Policy.load(recipe_of(folders, "flux", tmp_path, dtype="bf16"), CPU, TEXTS)
    Policy.load(recipe_of(folders, "flux_schnell", tmp_path), CPU, TEXTS)
    assert len(encodings) == 4 * len([*TEXTS, ""])
    assert len(list(tmp_path.iterdir())) == 4


def test_auto_keeps_small_encoders_and_frees_large_ones(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Policy.load(recipe_of(folders, "flux", "auto"), CPU, TEXTS).adapter.pipe.text_encoder is not None
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(embeddings, "_LARGE", 1000)
    assert Policy.load(recipe_of(folders, "flux", "auto"), CPU, TEXTS).adapter.pipe.text_encoder is None
    assert len(list((tmp_path / "flowgrove" / "embeddings").glob("*/*.safetensors"))) == len([*TEXTS, ""])


def test_conditioning_is_padded_together_and_split_again():
    parts = [
        Conditioning(
            {
                "states": torch.full((1, n, 2), float(n)),
                "states_mask": torch.ones(1, n, dtype=torch.bool),
                "pooled": torch.full((1, 4), float(n)),
            }
        )
        for n in (3, 1, 2)
    ]
    whole = Conditioning.cat(parts)
    assert len(whole) == 3
    assert whole.tensors["states"].shape == (3, 3, 2)
    assert whole.tensors["states_mask"].sum(1).tolist() == [3, 1, 2]
    assert whole.tensors["states"][1, 1:].abs().max() == 0
    for part, again in zip(parts, whole.split(), strict=True):
        assert all(torch.equal(part.tensors[key], again.tensors[key]) for key in part.tensors)
    chosen = whole[torch.tensor([2, 0, 2])]
    assert chosen.tensors["pooled"][:, 0].tolist() == [2, 3, 2]


def test_more_than_auto_writes_unasked_stays_in_host_memory(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embeddings, "_LARGE", 1000)
    monkeypatch.setattr(loading, "MOST_UNASKED", 10_000)
    many = [f"{text} {number}" for text in TEXTS for number in range(20)]
    policy = Policy.load(recipe_of(folders, "flux", "auto"), CPU, many)
    assert isinstance(policy.encoder, embeddings.OffloadedEncoder)
    assert policy.adapter.pipe.text_encoder is None
    expected = Policy.load(recipe_of(folders, "flux", "none"), CPU).encode(PROMPTS).cond
    found = policy.encode(PROMPTS).cond
    assert all(torch.allclose(found.tensors[key], tensor, atol=1e-6) for key, tensor in expected.tensors.items())
    stored = Policy.load(recipe_of(folders, "flux", tmp_path / "mine"), CPU, many)
    assert isinstance(stored.encoder, embeddings.StoredEncoder), "a folder that was named is used"


def test_a_disk_without_room_is_told_before_it_is_full(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(
        UserError, match=r"data.embedding_cache: the embeddings of 61 prompts take \d+ GB .* write none"
    ):
        Policy.load(
            recipe_of(folders, "flux", tmp_path), CPU, [f"{text} {number}" for text in TEXTS for number in range(20)]
        )


def test_zeros_at_the_end_take_no_room(folders, tmp_path):
    policy = Policy.load(recipe_of(folders, "wan", tmp_path, text_tokens=200), CPU, TEXTS)
    assert all(file.stat().st_size < 200 * 32 * 4 / 4 for file in tmp_path.glob("*/*.safetensors"))
    assert policy.encode(TEXTS).cond.tensors["encoder_hidden_states"].shape == (3, 200, 32)


@pytest.fixture
def loads(monkeypatch):
    """What every loading of a pipeline left on disk."""
    found = []
    load = loading.load_adapter

    def counted(kind, folder, recipe, device, weights, without=(), divided=False):
        found.append(without)
        return load(kind, folder, recipe, device, weights, without, divided)

    monkeypatch.setattr(loading, "load_adapter", counted)
    return found


@pytest.mark.parametrize(
    "lora", [pytest.param(None, marks=pytest.mark.long), {"rank": 2, "alpha": 2}], ids=["full", "lora"]
)
def test_commands_load_encoders_once_and_before_the_transformer(folders, tmp_path, loads, lora):
    recipe = tiny_recipe(
        tmp_path, model={**MODELS["wan"], "path": str(folders["wan"]), "guidance_scale": 3.0, "lora": lora},
        reward=[{"name": "jpeg_size"}], data={"embedding_cache": str(tmp_path / "embeddings")},
        run={"iterations": 1, "eval_every": 0},
    )  # fmt: skip
    encoders, rest = ("transformer", "vae"), ("text_encoder", "tokenizer")
    run = tmp_path / "run"
    succeed("train", recipe, "--out", run)
    assert loads == [encoders, rest]
    loads.clear()
    succeed("eval", run, "--set", f"data.embedding_cache={tmp_path / 'other'}")
    assert loads == [encoders, rest]
    loads.clear()
    succeed(
        "sample", run, "--prompts", write_lines(tmp_path / "p.txt", ["a new prompt"]), "--out", tmp_path / "samples"
    )
    assert loads == [encoders, rest]
    loads.clear()
    succeed("export", run, "--out", tmp_path / "export")
    assert loads == ([(*rest, "vae")] if lora is None else []), "a LoRA needs no model"
    if lora is None:
        theirs, ours = (
            (Path(folder) / "text_encoder" / "model.safetensors").read_bytes()
            for folder in (folders["wan"], tmp_path / "export")
        )
        assert theirs == ours


@pytest.mark.parametrize("cache", ["none", "stored"])
@pytest.mark.parametrize("name", sampled())
def test_prompts_that_differ_after_the_limit_are_told_once(folders, tmp_path, caplog, name, cache):
    long = "a red circle left of a blue square " * 20
    alike = [f"{long}one", f"{long}two", f"{long}three"]
    with caplog.at_level("WARNING", "flowgrove"):
        prompts = prompts_of(name, [*TEXTS, *alike, *TEXTS])
        Policy.load(recipe_of(folders, name, "none" if cache == "none" else tmp_path), CPU, prompts)
    told = [record.getMessage() for record in caplog.records if "limit" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("2 prompts differ from others only after the text encoders' limit")


@pytest.mark.parametrize("name", sampled())
def test_prompts_that_are_read_whole_are_not_told(folders, caplog, name):
    with caplog.at_level("WARNING", "flowgrove"):
        Policy.load(
            recipe_of(folders, name, "none"), CPU, ["a red", "a big", "A red", "a  red", "x" * 200, "a red circle"]
        )
    assert not [record for record in caplog.records if record.name.startswith("flowgrove")]


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_file_of_embeddings_is_one_line(folders, tmp_path, content):
    policy = Policy.load(recipe_of(folders, "wan", tmp_path), CPU, TEXTS)
    for file in tmp_path.glob("*/*.safetensors"):
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged .* remove it"):
        policy.encode(TEXTS)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.99])
def test_a_flipped_bit_among_embeddings_is_damage(folders, tmp_path, place):
    policy = Policy.load(recipe_of(folders, "wan", tmp_path), CPU, TEXTS)
    (file, *_) = tmp_path.glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(its content is not what was written\)"):
        policy.encode(TEXTS)


def test_embeddings_from_before_digests_are_read(folders, tmp_path):
    policy = Policy.load(recipe_of(folders, "wan", tmp_path), CPU, TEXTS)
    expected = policy.encode(TEXTS)
    for file in tmp_path.glob("*/*.safetensors"):
        save_file(load_file(file), file)
    assert torch.equal(
        policy.encode(TEXTS).cond.tensors["encoder_hidden_states"], expected.cond.tensors["encoder_hidden_states"]
    )
