"""Qwen-Image-2.1 beside what all families have: places of each row's own text, and tables of σ of the pipeline's own.
The transformer's own tests need no processor, and so no torchvision.
"""

import json
import shutil

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel

from flowgrove.errors import UserError
from flowgrove.models import loading
from flowgrove.models.families import family_of
from flowgrove.models.policy import Policy
from flowgrove.plan.sigmas import recipe_sigmas, scheduler_sigmas
from flowgrove.recipe.schema import Model
from policy_cases import CPU, small_recipe
from tiny_families import FAMILIES, MODELS

NAME = "qwen_image21"
GRID = (2, 6)
LENGTHS = (7, 12, 1)
with_torchvision = pytest.mark.skipif(NAME not in FAMILIES, reason="the processor needs torchvision")


def transformer(causal):
    """Weights large enough that prompt, time and place all matter."""
    model = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        mlp_ratio=2, axes_dims_rope=(8, 4, 4), causal_condition=causal,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture
def rows():
    """States, σ, texts and which of their tokens are there."""
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(3, 12, 4, generator=draw), torch.randn(3, 12, 16, generator=draw)
    return x, torch.tensor([0.9, 0.5, 0.1]), text, torch.arange(12) < torch.tensor(LENGTHS).unsqueeze(1)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_batch_is_what_diffusers_gives_for_each_row_alone(causal, rows):
    x, sigma, text, mask = rows
    ours = family_of(NAME)(None, transformer(causal)).transformer(x, sigma, GRID, text, mask)
    for row, length in enumerate(LENGTHS):
        alone = slice(row, row + 1)
        slots = torch.cat([torch.zeros(1, length), torch.ones(1, 3)], dim=1).bool()  # each of 2 × 2 tokens
        expected = transformer(causal)(
            hidden_states=x[alone],
            encoder_hidden_states=text[alone, :length],
            timestep=sigma[alone],
            img_shapes=[[(1, *GRID)]],
            img_mask=slots,
            return_dict=False,
        )[0][:, length:]
        assert (ours[alone] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (ours[0] - ours[1]).abs().max() > 0.01


@pytest.mark.parametrize("causal", [True, False])
def test_without_a_mask_rows_of_one_length_are_the_same_with_their_gradients(causal, rows):
    model, (x, sigma, text, mask) = family_of(NAME)(None, transformer(causal)).transformer, rows
    found = []
    for given in ((text, mask), (text[:, :7], None)):
        some = [one if one is None else one[:1] for one in given]
        v = model(x[:1], sigma[:1], GRID, *some)
        found.append([v, *torch.autograd.grad(v.square().sum(), list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_without_torchvision_one_line_says_what_to_install(tmp_path, monkeypatch):
    """With stored embeddings, too: the pipeline asks its processor as it is made."""
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    model = Model(adapter=NAME, path="there")
    for without in ((), family_of(NAME).TEXT):
        with pytest.raises(UserError, match=rf"^model.adapter {NAME} .* pip install torchvision$"):
            loading.load_adapter(family_of(NAME), tmp_path, model, CPU, torch.float32, without)


@with_torchvision
def test_a_pipelines_own_table_is_shifted_and_its_steps_are_named(folders, tmp_path):
    folder = shutil.copytree(folders[NAME], tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    own = [1.0, 0.7, 0.3]
    (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": own}), encoding="utf-8")
    model = {**MODELS[NAME], "path": str(folder), "dtype": "fp32"}
    recipe = small_recipe(model=model, rollout={"steps": 3, "shift": None})
    table = recipe_sigmas(recipe)
    size = Policy.load(recipe, CPU).adapter.geometry  # the list of numbers is taken for no part
    linear = scheduler_sigmas(folder, 3, size.picture_tokens, True, family_of(NAME).dynamic_shift)
    assert [table(place) for place in (0, 3)] == [1.0, 0.0]
    assert table(1) > linear(1), "0.7 in place of 2/3"
    assert table(2) < linear(2), "0.3 in place of 1/3"
    with pytest.raises(UserError, match=r"table has 3 steps, not 4: write 3 as rollout.steps .*, or set rollout.shift"):
        recipe_sigmas(small_recipe(model=model, rollout={"steps": 4, "shift": None}))
    assert recipe_sigmas(small_recipe(model=model, rollout={"steps": 4, "shift": 3.0}))(4) == 0.0
    for foreign, told in (("hi", "no list of numbers"), ({"a": 1}, "no list of numbers"), ([], None)):
        (folder / "model_index.json").write_text(json.dumps({**index, "sample_sigmas": foreign}), encoding="utf-8")
        if told is None:
            assert recipe_sigmas(recipe)(1) == linear(1)
        else:
            with pytest.raises(UserError, match=told):
                recipe_sigmas(recipe)


@with_torchvision
def test_pictures_with_an_alpha_channel_stand_on_white(folders):
    policy = Policy.load(small_recipe(model={**MODELS[NAME], "path": folders[NAME], "dtype": "fp32"}), CPU)
    vae = policy.adapter.pipe.vae
    grey, clear = torch.full((1, 3, 1, 32, 32), -0.5), torch.full((1, 1, 1, 32, 32), 0.0)
    vae.decode = lambda *_, **__: (torch.cat([grey, clear], dim=1),)
    assert policy.decode(torch.zeros(1, *policy.adapter.latent_shape)).unique().tolist() == [0.25 * 0.5 + 0.5]
