"""The guide engine/flowgrove/models/families/README.md:
its AuraFlow example, one file and one line taken from the page, against diffusers' own pipeline.
"""

import ast
import re
import sys
import types
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import flowgrove
from flowgrove.models import families
from flowgrove.models.folders import TINY
from flowgrove.models.policy import Policy
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import make_plan
from flowgrove.plan.sigmas import recipe_sigmas
from flowgrove.recipe.schema import model as schema
from flowgrove.rollout.loop import rollout
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, TEXTS, encoded, runner_of, small_recipe
from subprocesses import python
from tiny_families.parts import autoencoder, lively, t5_config

GUIDE = Path(families.__file__).with_name("README.md")


FILE, LINE = re.findall(r"```(?:python|text)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def new_schema():
    """What the recipe's schema defines once its list of names has the page's line."""
    lines = Path(schema.__file__).read_text(encoding="utf-8").splitlines()
    lines.insert(lines.index("]", lines.index("AdapterName = Literal[")), LINE.rstrip())
    module = types.ModuleType("new_schema")
    sys.modules["new_schema"] = module  # where annotations are looked up
    exec("\n".join(lines), vars(module))
    return vars(module)


def test_the_guide_holds_one_file_and_one_line():
    assert LINE.count("\n") == 1
    found = new_schema()
    assert get_args(found["AdapterName"]) == (*get_args(schema.AdapterName), "auraflow")
    assert found["Model"](adapter="auraflow", path="somewhere").adapter == "auraflow"


def test_every_name_of_the_schema_is_a_record_that_loads_no_pipeline():
    program = (
        "import sys\nfrom flowgrove.models.families import family_names, family_of\n"
        "for name in family_names():\n    record = family_of(name)\n"
        "    assert record.pipeline.endswith('Pipeline') and record.dtypes and record.lora_targets and record.TEXT\n"
        "print({'diffusers', 'transformers', 'peft'} & set(sys.modules))"
    )
    assert python("-c", program).stdout.strip() == "set()"


def test_no_other_module_of_the_engine_names_a_family():
    """Benchmarks build models of two families, which their recipes then name."""
    engine, names = Path(flowgrove.__file__).parent, set(families.family_names())
    own = {engine / "models" / "families" / f"{name}.py" for name in names}
    found = {
        path.relative_to(engine).as_posix()
        for path in set(engine.rglob("*.py")) - own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert found == {"recipe/schema/model.py", "bench/models.py"}


@pytest.fixture
def auraflow(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer_3")
    transformer = AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(t5_config(UMT5Config, tokenizer)), vae=autoencoder(),
        transformer=lively(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "family").mkdir()
    (tmp_path / "family" / "auraflow.py").write_text(FILE)  # as if it lay beside the others
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "family")])
    monkeypatch.setattr(families, "AdapterName", new_schema()["AdapterName"])
    recipe = small_recipe(
        model={
            "adapter": "sd3",
            "path": str(tmp_path),
            "dtype": "fp32",
            "guidance_scale": 3.5,
            "height": 16,
            "width": 32,
            "text_tokens": 9,
        },
        rollout={
            "steps": 4,
            "shift": None,
            "group_size": 2,
            "shared_initial_noise": False,
            "window": {"strategy": "none"},
        },
    )
    # as the new schema takes it
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": "auraflow"})})


@torch.no_grad()
def test_the_example_draws_what_the_diffusers_pipeline_draws(auraflow):
    policy = Policy.load(auraflow, CPU)
    plan = make_plan(auraflow, 0, recipe_sigmas(auraflow))
    forest = rollout(plan, plan_coefficients(plan), policy, encoded(policy), runner_of(policy), seed=3, iteration=9)
    pipe = AuraFlowPipeline.from_pretrained(auraflow.model.path)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.arange(len(TEXTS)).repeat_interleave(2)
    noise = philox_normal(
        (len(prompt), *policy.adapter.latent_shape),
        NoiseKey(3, 9, INITIAL_STEP, prompt, torch.arange(2).repeat(len(TEXTS))),
    )
    options = {"height": 16, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 9}
    texts = [text for text in TEXTS for _ in range(2)]
    expected = pipe(texts, latents=noise, output_type="latent", **options)
    assert (forest.leaves - expected.images).abs().max() <= 1e-4
    assert (forest.leaves[0] - forest.leaves[2]).abs().max() > 0.01
    pictures = pipe.image_processor.postprocess(
        pipe.vae.decode(expected.images / pipe.vae.config.scaling_factor).sample, output_type="pt"
    )
    assert (policy.decode(forest.leaves) - pictures).abs().max() <= 1e-4
