"""What Qwen-Image-Edit and its successors have beside what all families have: their encoder's pictures, which
pipeline a folder is of, and what is refused.
"""

import pytest
import torch

from flowgrove.errors import UserError
from flowgrove.models import loading
from flowgrove.models.families import read_geometry
from flowgrove.models.families.qwen_image_edit import QwenImageEdit
from flowgrove.models.folders import ARCHITECTURES
from flowgrove.models.policy import Policy
from flowgrove.recipe.schema import Model
from policy_cases import CPU, small_recipe
from tiny_families import FAMILIES, MODELS

ONE, SEVERAL = ARCHITECTURES / "qwen_image_edit", ARCHITECTURES / "qwen_image_edit_2509"
with_torchvision = pytest.mark.skipif("qwen_image_edit" not in FAMILIES, reason="the processor needs torchvision")


def model(**settings):
    return Model(adapter="qwen_image_edit", path="there", height=512, width=512, **settings)


def test_without_torchvision_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model.adapter qwen_image_edit .* pip install torchvision$"):
        loading.load_adapter(QwenImageEdit, tmp_path, model(), CPU, torch.float32)


@pytest.mark.parametrize(
    ("folder", "pictures", "sides", "tokens"),
    [
        (ONE, 1, (512, 512), 37 * 37),  # of a side of 1024 pixels, in 28 of a token
        (ONE, 1, (256, 1024), 18 * 73),  # 512 × 2048
        (SEVERAL, 3, (512, 512), 3 * 14 * 14),  # 384
        (SEVERAL, 2, (256, 1024), 2 * 7 * 27),  # 192 × 768
    ],
)
def test_the_pictures_count_in_the_text_and_beside_what_is_drawn(folder, pictures, sides, tokens):
    height, width = sides
    size = read_geometry(folder, model(source_pictures=pictures).model_copy(update={"height": height, "width": width}))
    assert size.text_tokens == 512 + tokens
    assert size.source_tokens == pictures * (height // 16) * (width // 16)


def test_the_folder_says_which_pipeline_it_is():
    assert [QwenImageEdit.pipeline_name(folder) for folder in (ONE, SEVERAL)] == [
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    ]


@pytest.mark.parametrize(("folder", "pictures"), [(ONE, 2), (SEVERAL, 4), (SEVERAL, 0)])
def test_another_number_of_pictures_is_one_line(folder, pictures):
    with pytest.raises(UserError, match=f"^model.source_pictures is {pictures}: .* takes 1") as caught:
        read_geometry(folder, model(source_pictures=pictures))
    assert "\n" not in str(caught.value)


@with_torchvision
@pytest.mark.parametrize("name", ["qwen_image_edit", "qwen_image_edit_plus"])
def test_a_long_prompt_is_cut_behind_its_pictures(folders, name):
    family = FAMILIES[name]
    settings = {**MODELS[name], "path": folders[name], "dtype": "fp32", "text_tokens": 48}
    adapter = Policy.load(small_recipe(model=settings), CPU).adapter
    (short,), (long,) = family.prompts(["red"]), family.prompts(["red " * 40])
    long.pictures = short.pictures
    brief, whole = (adapter.encode([prompt]).tensors for prompt in (short, long))
    assert whole["encoder_hidden_states"].shape[1] == adapter.geometry.text_tokens
    assert adapter.geometry.text_tokens == 48 + 4 * family.sources  # tokens of a picture, as the tiny processor has it
    kept = 4 * family.sources + len("red")  # the encoder reads from left to right
    read = [tensors["encoder_hidden_states"][:, :kept] for tensors in (brief, whole)]
    assert (read[0] - read[1]).abs().max() <= 1e-5
    assert torch.equal(brief["source_latents"], whole["source_latents"])
