"""FLUX.2's shift, its distilled models and its processor, against diffusers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from flowgrove.errors import UserError
from flowgrove.models.adapter import text_tokenizer
from flowgrove.models.families.flux2 import Flux2
from flowgrove.models.policy import Policy
from policy_cases import CPU, TEXTS, encoded, small_recipe
from tiny_families import MODELS


@pytest.mark.parametrize("steps", [1, 4, 28, 50, 200, 400])
@pytest.mark.parametrize("tokens", [64, 1024, 4300, 4301, 16384])
def test_the_shift_is_the_pipelines(tokens, steps):
    assert Flux2.dynamic_shift({}, tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_a_distilled_model_draws_without_guidance_or_not_at_all(folders, tmp_path):
    folder = shutil.copytree(folders["flux2_klein"], tmp_path / "distilled")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    model = {**MODELS["flux2_klein"], "path": str(folder), "dtype": "fp32"}
    policy = Policy.load(small_recipe(model=model), CPU)
    x = torch.randn(len(TEXTS), *policy.adapter.latent_shape)
    with torch.no_grad():
        v = policy.velocity(x, torch.full((len(TEXTS),), 0.5), encoded(policy), torch.arange(len(TEXTS)))
    assert v.uncond is None
    assert v.v.shape == x.shape
    with pytest.raises(UserError, match=r"model.guidance_scale is 4: .* without guidance: leave it out") as caught:
        Policy.load(small_recipe(model={**model, "guidance_scale": 4.0}), CPU)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"run.eval.guidance_scale is 4: .* without guidance"):
        Policy.load(small_recipe(model=model, run={"eval": {"guidance_scale": 4.0}}), CPU)


def test_a_processor_reads_texts_by_its_tokenizer():
    tokenizer = object()
    assert text_tokenizer(SimpleNamespace(tokenizer=tokenizer)) is tokenizer
    assert text_tokenizer(tokenizer) is tokenizer
