"""What decides a held-out reward is compared between recipes, and nothing that nobody reads."""

import json

import pytest

from flowgrove.compare.judging import judged
from flowgrove.setup import Setup
from policy_cases import small_recipe

ROW = {"prompt": "a red circle at the centre"}


def of(tmp_path, row=ROW, scale=3.0, data=None, **model):
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return judged(
        Setup(
            small_recipe(
                model={"guidance_scale": scale, **model},
                data={"prompts": "none.txt", "eval_prompts": str(file), **(data or {})},
            )
        )
    )


def differing(one, other):
    return {key for key in one if one[key] != other[key]}


@pytest.mark.parametrize(("key", "value"), [("negative_prompt", "blurred"), ("cfg_normalization", 1.0)])
def test_what_guidance_reads_decides_where_there_is_guidance(tmp_path, key, value):
    assert differing(of(tmp_path), of(tmp_path, **{key: value})) == {f"model.{key}"}
    assert differing(of(tmp_path, scale=1.0), of(tmp_path, scale=1.0, **{key: value})) == set()


def test_the_base_model_decides_with_what_it_starts_from(tmp_path):
    lora = {"rank": 2, "alpha": 4}
    plain = of(tmp_path, lora=lora)
    assert differing(plain, of(tmp_path, lora=lora, base_precision="int8")) == {"model.base_precision"}
    merged = of(tmp_path, lora=lora, init_lora={"path": "lora.safetensors", "merge": True})
    assert differing(plain, merged) == {"model.init_lora"}


def test_prompts_are_compared_with_all_that_their_rows_hold(tmp_path):
    plain = of(tmp_path)
    assert differing(plain, of(tmp_path, {**ROW, "negative_prompt": "blurred"})) == {"data.eval_prompts"}
    tagged = [of(tmp_path, {**ROW, "tag": tag}, data={"metadata": ["tag"]}) for tag in ("one", "two")]
    assert differing(*tagged) == {"data.eval_prompts"}
