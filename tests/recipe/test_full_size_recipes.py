"""The recipes of full-size models: each plans without a download, with the published counts,
and says where its model and prompts come from.
"""

from pathlib import Path

import pytest

from engine_cases import refuse
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.recipe.loading import load_recipe
from flowgrove.rewards.registry import _REWARDS

RECIPES = Path(__file__).parents[2] / "recipes"
BASES = ("flux", "sd35m")  # what others extend
# PRIOR_ART §5 and MATH §5: steps, leaves, rollout forwards, trained edges of iteration 0. The grove_* are ours: a root,
# its children, and every leaf in each step of the tail.
COUNTS = {
    "dance_flux": (16, 12, 1 + 12 * 15, 12 * 9),
    "mix_flux": (25, 12, 1 + 12 * 24, 48),
    "mix_flash_flux": (12, 12, 1 + 12 * 11, 48),
    "mix_flash_star_flux": (8, 12, 1 + 12 * 7, 48),
    "branch_flux": (20, 16, 203, 202 - 4 * 16),
    "branch_mix_flux": (20, 16, 203, 34),
    "branch_mix_flash_flux": (14, 16, 107, 34),
    "grove_flux": (9, 16, 117, 20),
    "grove_sd35m": (5, 16, 53, 20),
    "grove_wan": (9, 9, 67, 12),
    "grove_wan_vace": (9, 9, 67, 12),
    "grove_wan_i2v": (9, 9, 67, 12),
    "grove_wan22": (9, 9, 67, 12),
    "grove_wan22_5b": (9, 9, 67, 12),
    "flow_kontext": (6, 21, 126, 105),
    "flow_sd35m": (10, 24, 240, 216),
    "fast_flux": (6, 24, 144, 72),
    "fast_sd35m": (10, 24, 217, 72),
    "mix_sd35m": (10, 24, 217, 96),
    "mix_qwen": (10, 16, 130, 32),
    "flow_qwen_edit": (10, 16, 160, 144),
    "mix_z_image": (8, 16, 1 + 16 * 7, 32),
    "mix_flux2_klein": (10, 16, 130, 32),
    "grove_flux2": (9, 16, 117, 20),
    "mix_chroma": (10, 16, 130, 32),
    "flow_wan": (20, 8, 160, 152),
    "mix_ltx": (16, 8, 79, 16),
    "grove_hunyuan15": (9, 9, 67, 12),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_recipe_plans_its_published_counts_without_a_download(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    plan = make_plan(recipe, 0, recipe_sigmas(recipe))
    counts = plan.counts
    assert (len(plan.steps), counts.leaves, counts.rollout_forwards, counts.trained_edges) == COUNTS[name]
    assert plan.steps[-1].sigma_next == 0
    assert all(reward.name in _REWARDS for reward in recipe.reward)
    last = make_plan(recipe, recipe.run.iterations - 1, recipe_sigmas(recipe))
    assert last.counts.trained_edges > 0


def test_every_recipe_is_counted_here_or_belongs_to_the_embedded_pipeline():
    names = {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("shapes", "quickstart"))}
    assert names == {*COUNTS, *BASES}


def test_training_without_the_model_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    text = refuse(
        "train", RECIPES / "mix_sd35m.yaml", "--set", f"data.prompts={prompts}", "--set", "reward=[{name: jpeg_size}]",
        "--set", "engine.device=cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "hf download stabilityai/stable-diffusion-3.5-medium" in text
