"""Models with two experts (Wan2.2's A14B): which one runs a step, which one trains, and how both are exported."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from engine_cases import refuse, succeed
from flowgrove.credit import assign_credit
from flowgrove.errors import UserError
from flowgrove.models.experts import FOLDERS, expert_of
from flowgrove.models.families import family_of
from flowgrove.models.folders import lora_file
from flowgrove.models.initial_lora import check_initial_lora
from flowgrove.models.lora_files import how_to_load, layers_of, write_lora
from flowgrove.models.policy import Policy
from flowgrove.models.quantised import QuantisedLinear
from flowgrove.plan.coefficients import plan_coefficients
from flowgrove.plan.planner import expert_at, make_plan
from flowgrove.plan.sigmas import listed_sigmas, recipe_sigmas
from flowgrove.recipe.schema import Lora
from flowgrove.report.series import unshared_passes
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from flowgrove_kernels import INITIAL_STEP, NoiseKey, philox_normal
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS

LORA = {"rank": 4, "alpha": 8}
# σ of 6 steps at shift 3: 1, .938, .857, .75, .6, .375; the boundary of the tiny pipeline is .875
WINDOW = {"steps": 6, "shift": 3.0, "window": {"strategy": "frozen", "size": 3}}


def recipe_of(folders, rollout=WINDOW, name="wan_a14b", **model):
    told = {**MODELS[name], "path": folders[name], "dtype": "fp32", "gradient_checkpointing": False, **model}
    return small_recipe(model=told, rollout=rollout, update={"updates_per_iteration": 1})


def states(policy, count):
    return torch.randn(count, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))


def velocity(policy, expert):
    return policy.of_expert(expert).velocity(
        states(policy, 2), torch.tensor([0.9, 0.9]), encoded(policy), torch.tensor([0, 1])
    ).v  # fmt: skip


@torch.no_grad()
def test_each_expert_draws_its_steps_at_its_own_guidance_scale(folders):
    ode = {"steps": 4, "shift": None, "shared_initial_noise": False, "window": {"strategy": "none"}}
    recipe = recipe_of(folders, ode, guidance_scale=3.5, guidance_scale_2=2.0)
    pipe = FAMILIES["wan_a14b"].pipeline.from_pretrained(folders["wan_a14b"])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.scheduler.set_timesteps(4)
    policy = Policy.load(recipe, CPU)
    sigmas = replace(listed_sigmas(pipe.scheduler.sigmas.tolist()), boundary=recipe_sigmas(recipe).boundary)
    plan = make_plan(recipe, 0, sigmas)
    assert [step.expert for step in plan.steps] == ["high", "low", "low", "low"]
    forest = rollout(plan, plan_coefficients(plan), policy, encoded(policy), runner_of(policy), seed=3, iteration=9)
    prompt = torch.arange(len(TEXTS)).repeat_interleave(4)
    key = NoiseKey(3, 9, INITIAL_STEP, prompt, torch.arange(4).repeat(len(TEXTS)))
    drawn = pipe(
        prompt=[text for text in TEXTS for _ in range(4)], num_inference_steps=4, output_type="latent",
        latents=philox_normal((len(prompt), *policy.adapter.latent_shape), key), guidance_scale_2=2.0,
        **FAMILIES["wan_a14b"].options(3.5, [text for text in TEXTS for _ in range(4)], recipe.model),
    )  # fmt: skip
    assert (forest.leaves - drawn.frames).abs().max() <= 1e-4


def test_a_plan_says_which_expert_runs_each_step(folders, tmp_path):
    path = tmp_path / "mine.yaml"
    model = {**MODELS["wan_a14b"], "path": folders["wan_a14b"], "trained_experts": "low"}
    path.write_text(
        f"model: {model}\ndata: {{prompts: none.txt}}\nreward: [{{name: jpeg_size}}]\n"
        "rollout: {steps: 6, shift: 3.0, group_size: 4, window: {strategy: frozen, size: 3}}\n"
        "update: {updates_per_iteration: 1}\n"
    )
    steps = json.loads(succeed("plan", path, "--json").stdout)["steps"]
    assert [step["expert"] for step in steps] == ["high"] * 2 + ["low"] * 4
    assert [step["trained"] for step in steps] == [False, False, True, False, False, False]
    drawn = succeed("plan", path).stdout
    assert "frozen" in drawn
    assert "high" in drawn
    assert "rollout.window.range: [2, 5]" in refuse("plan", path, "--set", "rollout.window.size=2")
    pruned = ("rollout.window.size=3", "credit.prune={kind: depth, depths: 1, first: 2, stop: 3}")
    assert "rollout.window" in refuse("plan", path, *(part for one in pruned for part in ("--set", one)))
    auto = {"splits": "auto", "fanout": 2}
    recipe = recipe_of(folders, {"steps": 6, "window": {"strategy": "none"}, "tree": auto}, trained_experts="low")
    with pytest.raises(UserError, match=r"rollout\.tree\.splits: auto may choose"):
        Setup(recipe).first_plan  # noqa: B018


def test_a_report_counts_the_passes_of_the_expert_that_trains_or_does_not_compare_them(folders, tmp_path):
    every_step = {"steps": 6, "window": {"strategy": "frozen", "size": 5}}
    recipe = recipe_of(folders, every_step, trained_experts="low")
    counts, prompts = Setup(recipe).first_plan.counts, recipe.data.prompts_per_iteration
    both = Setup(recipe_of(folders, every_step)).first_plan.counts
    assert counts.unshared_train_passes < both.unshared_train_passes
    expected = counts.unshared_rollout_forwards * prompts, counts.unshared_train_passes * prompts
    assert unshared_passes(recipe, [{"iteration": 0}]) == [expected]
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tmp_path / "moved")})})
    assert unshared_passes(moved, [{"iteration": 0}]) == []


@pytest.mark.parametrize(("sigma", "expert"), [(0.875, "high"), (0.875 - 1e-7, "high"), (0.874, "low"), (1.0, "high")])
def test_a_step_at_the_boundary_is_of_high_noise_however_it_is_rounded(sigma, expert):
    table = replace(listed_sigmas([1.0, 0.5, 0.0]), boundary=0.875)
    assert expert_at(sigma, table) == expert


def test_the_reference_model_shares_the_expert_that_does_not_train(folders):
    recipe = recipe_of(folders, trained_experts="low", lora=None)
    recipe = recipe.model_copy(update={"update": recipe.update.model_copy(update={"kl_weight": 0.1})})
    weights = Policy.load(recipe, CPU).weights
    ours, copy = (dict(one.named_parameters()) for one in (weights.transformer, weights.reference_copy))
    shared = {name for name, weight in copy.items() if weight.data_ptr() == ours[name].data_ptr()}
    assert shared == {name for name in ours if name.startswith("transformer.")}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("wan_flow_grpo_high", "wan_flow_grpo_low"), {"high": "wan_flow_grpo_high", "low": "wan_flow_grpo_low"}),
        (("flowgrove", "flowgrove_low"), {"high": "flowgrove", "low": "flowgrove_low"}),
        (("A-HighNoise", "A-Low-noise"), {"high": "A-HighNoise", "low": "A-Low-noise"}),
        (("lowres", "highlights"), None),
    ],
)
def test_files_are_of_an_expert_by_a_word_of_their_own(tmp_path, names, found):
    for name in names:
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    for expert in FOLDERS:
        if found is None:
            with pytest.raises(UserError, match="high in the name of one and low in that of the other"):
                lora_file(str(tmp_path), expert)
        else:
            assert lora_file(str(tmp_path), expert).stem == found[expert]


def test_only_the_expert_that_trains_is_rounded_anew(folders, monkeypatch):
    recipe = recipe_of(folders, {**WINDOW, "precision": "int8"}, trained_experts="low", lora=None)
    weights, rounded = Policy.load(recipe, CPU).weights, []
    names = {id(layer): name for name, layer in weights.cheap.layers.items()}
    assert {expert_of(name)[0] for name in names.values()} == {"high", "low"}
    monkeypatch.setattr(QuantisedLinear, "follow", lambda layer: rounded.append(names[id(layer)]))
    weights.refresh()
    assert weights.cheap is not None
    assert sorted(rounded) == sorted(name for name in names.values() if expert_of(name)[0] == "low")


@pytest.mark.parametrize(("trained", "stochastic"), [("both", "high"), ("high", "both"), ("low", "both")])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_what_trains_moves_and_nothing_else(folders, trained, stochastic, lora):
    """A frozen expert's steps have no gradient, and an expert without a trained step keeps weights and moments."""
    window = {**WINDOW["window"], "size": 2 if stochastic == "high" else 4}
    recipe = recipe_of(folders, {**WINDOW, "window": window}, lora=lora, trained_experts=trained)
    recipe = recipe.model_copy(update={"update": recipe.update.model_copy(update={"weight_decay": 0.1, "lr": 0.01})})
    policy = Policy.load(recipe, CPU)
    assert {expert_of(name)[0] for name in policy.weights.trainable()} == (
        {"high", "low"} if trained == "both" else {trained}
    )
    before = {name: weight.detach().clone() for name, weight in policy.transformer.named_parameters()}
    plan, rows = plan_and_coefficients(recipe)
    assert {step.expert for step in plan.steps if step.stochastic} == (
        {"high"} if stochastic == "high" else {"high", "low"}
    )
    (moves,) = {step.expert for step in plan.trained_steps}
    scores = np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1))
    credit = assign_credit(plan, recipe.credit, scores, [1.0])
    updater, prompts = Updater(recipe, policy, runner_of(policy, recipe)), encoded(policy)
    for _ in range(2):
        forest = rollout(plan, rows, policy, prompts, updater.runner, seed=1, iteration=0)
        updater.run([Rolled(policy, forest, prompts, credit, rows)])
    moved = {name for name, weight in policy.transformer.named_parameters() if not torch.equal(weight, before[name])}
    assert {expert_of(name)[0] for name in moved} == {moves}
    assert {expert_of(name)[0] for name, p in policy.weights.trainable().items() if p in updater.optimizer.state} == {
        moves
    }


@pytest.mark.parametrize("trained", ["both", "low"])
@torch.no_grad()
def test_a_lora_is_a_file_for_each_expert(folders, tmp_path, trained):
    policy = Policy.load(recipe_of(folders, lora=LORA, trained_experts=trained), CPU)
    plain = Policy.load(recipe_of(folders), CPU)
    for weight in policy.weights.trainable().values():
        torch.nn.init.normal_(weight, std=0.3)
    policy.adapter.save_lora(tmp_path / "lora")
    base = {expert: velocity(plain, expert) for expert in FOLDERS}
    pipe, files = plain.adapter.pipe, {file.name for file in (tmp_path / "lora").iterdir()}
    if trained == "both":
        pipe.load_lora_weights(tmp_path / "lora")
    low = "pytorch_lora_weights_low_noise.safetensors"
    pipe.load_lora_weights(tmp_path / "lora", weight_name=low, load_into_transformer_2=True)
    assert files == ({low, "pytorch_lora_weights.safetensors"} if trained == "both" else {low})
    for expert in FOLDERS:
        assert (velocity(plain, expert) - velocity(policy, expert)).abs().max() <= 1e-5
        changed = trained in ("both", expert)
        assert ((velocity(policy, expert) - base[expert]).abs().max() > 1e-2) == changed


@torch.no_grad()
def test_comfyui_gets_a_file_for_each_expert_under_the_same_names(folders, tmp_path):
    policy = Policy.load(recipe_of(folders, lora=LORA), CPU)
    weights = {name: torch.randn_like(weight) for name, weight in policy.weights.trainable().items()}
    lora = Lora(**LORA)
    layers = layers_of(weights, lora)
    write_lora(tmp_path / "lora", "comfyui", layers, lora, family_of("wan"))
    told = how_to_load(tmp_path / "lora", "comfyui", layers, family_of("wan"))
    files = {expert: tmp_path / "lora" / f"comfyui_lora_{expert}_noise.safetensors" for expert in FOLDERS}
    assert set((tmp_path / "lora").iterdir()) == set(files.values())
    assert all(str(file) in told for file in files.values())
    high, low = (load_file(file) for file in files.values())
    assert high.keys() == low.keys()
    for expert, tensors in (("high", high), ("low", low)):
        up = weights[f"{FOLDERS[expert]}.blocks.1.attn2.to_q.lora_B.default.weight"]
        assert torch.equal(tensors["diffusion_model.blocks.1.cross_attn.q.lora_up.weight"], up * 2)


@torch.no_grad()
def test_a_full_export_copies_the_frozen_expert(folders, tmp_path):
    policy = Policy.load(recipe_of(folders, trained_experts="low"), CPU)
    for weight in policy.weights.trainable().values():
        weight.mul_(1.1)
    policy.adapter.save_pipeline(tmp_path / "export")
    loaded = Policy.load(recipe_of({"wan_a14b": str(tmp_path / "export")}), CPU)
    for expert in FOLDERS:
        assert torch.equal(velocity(loaded, expert), velocity(policy, expert))
    file = "transformer/diffusion_pytorch_model.safetensors"
    theirs, ours = (load_file(f"{root}/{file}") for root in (folders["wan_a14b"], tmp_path / "export"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_both_experts_start_from_their_files_of_an_export(folders, tmp_path):
    """Trained on and merged, both or one; and a change of either file makes another run."""
    first = Policy.load(recipe_of(folders, lora=LORA), CPU)
    for number, weight in enumerate(first.weights.trainable().values()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(number))
    first.adapter.save_lora(tmp_path / "lora")
    expected = {expert: velocity(first, expert) for expert in FOLDERS}
    base = Policy.load(recipe_of(folders), CPU)
    untouched = {expert: velocity(base, expert) for expert in FOLDERS}

    def started(**model):
        init_lora = {"path": str(tmp_path / "lora"), "merge": model.pop("merge", False)}
        return recipe_of(folders, lora=LORA, init_lora=init_lora, **model)

    for recipe in (started(), started(merge=True)):
        check_initial_lora(recipe.model)
        policy = Policy.load(recipe, CPU)
        for expert in FOLDERS:
            assert (velocity(policy, expert) - expected[expert]).abs().max() <= 1e-5
            assert (untouched[expert] - expected[expert]).abs().max() > 1e-2
    for trained, other in (("low", "high"), ("high", "low")):
        policy = Policy.load(started(trained_experts=trained), CPU)
        assert (velocity(policy, trained) - expected[trained]).abs().max() <= 1e-5
        assert torch.equal(velocity(policy, other), untouched[other])
    fingerprints = {Setup(started(trained_experts=which)).initial_lora for which in ("both", "high", "low")}
    assert len(fingerprints) == 3
    (low,) = (tmp_path / "lora").glob("*low*")
    low.unlink()
    told = "holds one file for two experts, and a file is of one: give a folder with two"
    with pytest.raises(UserError, match=told):
        check_initial_lora(started().model)
    assert Setup(started(trained_experts="high")).initial_lora in fingerprints


def test_passes_of_two_experts_are_recorded_apart(folders):
    policy = Policy.load(recipe_of(folders), CPU)
    assert len({policy.of_expert(expert).weights_in_use for expert in FOLDERS}) == 2
    assert policy.of_expert("low").adapter is policy.of_expert("low").adapter, "an adapter keeps what it finds"


@pytest.mark.parametrize(
    ("name", "model", "text"),
    [
        ("wan", {"trained_experts": "high"}, "model.trained_experts is for models with two experts"),
        ("wan", {"guidance_scale": 4.0, "guidance_scale_2": 3.0}, "model.guidance_scale_2 is for models with two"),
    ],
)
def test_keys_of_experts_are_for_models_that_have_them(folders, name, model, text):
    with pytest.raises(UserError, match=text):
        Setup(recipe_of(folders, name=name, **model)).first_plan  # noqa: B018
    with pytest.raises(UserError, match=text):
        Policy.load(recipe_of(folders, name=name, **model), CPU)
