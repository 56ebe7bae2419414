"""image_reward against the authors' own network (tests/fixtures/make_image_reward.py),
and against direct use of `transformers`.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertTokenizer, CLIPImageProcessorPil

from host_reads import DEVICE, HostWaits
from planner_cases import user_error
from reward_cases import as_pil, pictures, reward_of, rewards_of, same_on_a_gpu

FIXTURE = Path(__file__).parents[1] / "fixtures" / "image_reward.safetensors"
MED = {"num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "red", "##s", "dog", "two"]
PROMPTS = ["a red cat", "two dogs", "a red cat", ""]


@pytest.fixture(scope="module")
def known():
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def weights(known):
    return {name.removeprefix("weights."): value for name, value in known.items() if name.startswith("weights.")}


@pytest.fixture
def folder(tmp_path, weights):
    """The published files, and a BERT tokenizer of a few words."""
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def scorer(folder):
    return reward_of(name="image_reward", path=str(folder), tokenizer=str(folder), batch_size=3)


def test_scores_are_those_of_the_authors_code(scorer, known):
    """From what the model reads on: tokens and normalised pictures in, scores out."""

    class Words(dict):
        input_ids, attention_mask = known["tokens"], known["mask"]

        def to(self, device):
            return self

    scorer.tokenizer = lambda *arguments, **options: Words()
    scorer.preprocess = lambda pixels: pixels
    scorer.batch_size = 4
    torch.testing.assert_close(scorer(known["pictures"], PROMPTS), known["scores"], atol=1e-5, rtol=1e-5)
    assert known["scores"].std() > 0.1
    seen = scorer.vision(pixel_values=known["pictures"]).last_hidden_state
    torch.testing.assert_close(seen, known["seen"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_and_pictures_reach_the_model_as_the_library_prepares_them(scorer, folder):
    """One at a time, without padding: what stands behind a text's end must not count."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    tokenizer, batch = AutoTokenizer.from_pretrained(folder), pictures(4, 16, 16)
    wanted = []
    for picture, prompt in zip(as_pil(batch), PROMPTS, strict=True):
        seen = scorer.vision(pixel_values=processor(picture, return_tensors="pt").pixel_values).last_hidden_state
        words = tokenizer(prompt, return_tensors="pt")
        read = scorer.text(input_ids=words.input_ids, encoder_hidden_states=seen).last_hidden_state[0, 0]
        for weight, bias in scorer.head.layers:
            read = weight @ read + bias
        wanted.append((read[0] - 0.16717362830052426) / 1.0333394966054072)
    assert tokenizer("a red cat").input_ids == [2, 5, 7, 6, 3]
    scores = scorer(batch, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.stack(wanted), atol=1e-5, rtol=1e-5)


def test_a_prompt_is_read_up_to_its_35th_token(scorer):
    same = pictures(1, 16, 16).repeat(3, 1, 1, 1)
    # with [CLS] and [SEP] the 34th word is the first that is cut
    scores = scorer(same, ["a " * 33 + "red", "a " * 33 + "cat", "a " * 32 + "red"])
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs() > 1e-4


def test_scores_do_not_depend_on_the_batch(folder):
    batch = pictures(4, 30, 20)
    alone, together = (
        reward_of(name="image_reward", path=str(folder), tokenizer=str(folder), batch_size=size)(batch, PROMPTS)
        for size in (1, 8)
    )
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "lost",
    [
        "mlp.layers.0.weight",
        "blip.visual_encoder.pos_embed",
        "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias",
        "blip.visual_encoder.norm.bias",
    ],
)
def test_a_file_that_lacks_a_tensor_is_refused(folder, weights, lost):
    torch.save({name: value for name, value in weights.items() if name != lost}, folder / "ImageReward.pt")
    text = user_error(rewards_of, {"name": "image_reward", "path": str(folder), "tokenizer": str(folder)})
    assert str(folder / "ImageReward.pt") in text


def test_settings_that_lack_a_value_are_refused(folder):
    (folder / "med_config.json").write_text(json.dumps({"hidden_act": "gelu"}))
    assert "num_attention_heads" in user_error(
        rewards_of, {"name": "image_reward", "path": str(folder), "tokenizer": str(folder)}
    )


def test_an_absent_tokenizer_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    text = user_error(rewards_of, {"name": "image_reward", "path": str(folder)})
    assert all(part in text for part in ("tokenizer", "hf download google-bert/bert-base-uncased"))


@pytest.mark.parametrize("where", ["cpu", DEVICE])
@torch.no_grad()
def test_nothing_is_copied_from_pageable_memory(folder, where):
    """Which the thread that scores would wait for, beside the rollout."""
    entry = {"name": "image_reward", "path": str(folder), "tokenizer": str(folder), "batch_size": 2}
    (scorer,) = rewards_of(entry, device=DEVICE).scorers.values()
    batch = pictures(len(PROMPTS), 30, 20).to(where)
    with HostWaits() as waits:
        scores = scorer(batch, PROMPTS)
    assert [line for line in waits.noted if not line.startswith("reads")] == []
    assert (scores.device, scores.shape) == (DEVICE, (len(PROMPTS),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_gives_the_same_scores(folder):
    same_on_a_gpu(1e-3, name="image_reward", path=str(folder), tokenizer=str(folder))
