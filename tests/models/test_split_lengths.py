"""engine.split_lengths: texts of each length run apart, without masks, and give what they give padded and masked."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from flowgrove.credit import assign_credit
from flowgrove.errors import UserError
from flowgrove.models import attention, compiling
from flowgrove.models.compiled_passes import compile_ahead
from flowgrove.models.conditioning import Conditioning
from flowgrove.models.policy import Policy
from flowgrove.plan.unloaded import UnloadedModel
from flowgrove.recipe.checks import check_meaning
from flowgrove.rollout.loop import rollout
from flowgrove.setup import Setup
from flowgrove.tuning import tune
from flowgrove.tuning.pass_times import Passes, Work
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from host_reads import HostWaits
from policy_cases import CPU, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS

MASKED = ("qwen_image", "z_image", "hunyuan_video15", "ltx", "qwen_image21", "qwen_image_edit_plus")
NAMES = [name for name in MASKED if name in FAMILIES]
TEXTS = ["a cat", 'a sign that says "open"', "", "a very long wall with one and two on it, " * 2, "a dog"]
LORA = {"rank": 4, "alpha": 8}


def recipe_of(folders, name, splits, engine=None, **model):
    longer = {"text_tokens": 400} if name == "qwen_image" else {}
    told = {**MODELS[name], **longer, "path": folders[name], "dtype": "fp32", **model}
    return small_recipe(model=told, engine={"split_lengths": splits, **(engine or {})})


def watched(policy):
    """(rows, names of masks) of every forward of its transformer."""
    found, inner = [], policy.adapter.velocity

    def velocity(x, sigma, cond, scale):
        found.append((len(x), [key for key in cond.tensors if key.endswith("_mask")]))
        return inner(x, sigma, cond, scale)

    policy.adapter.velocity = velocity
    return found


def both(prompts):
    """The lengths of rows with guidance, the unconditional ones behind."""
    return np.concatenate(np.split(prompts.masked_lengths, 2, axis=1))


@pytest.mark.parametrize("name", NAMES)
def test_velocities_and_gradients_are_those_of_masked_rows(folders, name):
    found = []
    order = torch.tensor([0, 0, 3, 1, 2, 2, 4])
    for splits in (False, True):
        policy = Policy.load(recipe_of(folders, name, splits, guidance_scale=3.5, lora=LORA), CPU)
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(number))
        policy.weights.refresh()
        prompts, forwards = encoded(policy, TEXTS), watched(policy)
        x = torch.randn(7, *policy.adapter.latent_shape, generator=torch.Generator().manual_seed(0))
        v = policy.velocity(x, torch.linspace(0.9, 0.1, 7), prompts, order, order.numpy())
        whole = v.v if v.uncond is None else torch.cat([v.v, v.uncond])
        whole.square().mean().backward()
        gradients = [weight.grad for weight in policy.weights.trainable().values() if weight.grad is not None]
        found.append((whole.detach(), gradients))
    (masked, theirs), (split, ours) = found
    assert (masked - split).abs().max() <= 1e-5 * masked.abs().max()
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max() + 1e-9
    kinds = {tuple(row) for row in both(prompts)}
    assert len(kinds) >= 3
    assert len(forwards) == len(kinds), "one of all rows that are alike"
    assert sum(rows for rows, _ in forwards) == 14
    assert not any(masks for _, masks in forwards)


@pytest.mark.parametrize("name", NAMES[:2])
def test_rollout_and_update_are_those_of_masked_rows(folders, name):
    found = []
    for splits in (False, True):
        recipe = recipe_of(folders, name, splits, guidance_scale=2.0, lora=LORA)
        policy = Policy.load(recipe, CPU)
        updater = Updater(recipe, policy, runner_of(policy, recipe))
        plan, rows = plan_and_coefficients(recipe)
        prompts, forwards = encoded(policy), watched(policy)
        forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=0, iteration=0)
        scores = np.random.default_rng(0).random((len(prompts), plan.leaves, 1))
        credit = assign_credit(plan, recipe.credit, scores, [1.0])
        stats = updater.run([Rolled(policy, forest, prompts, credit, rows)])
        weights = torch.cat([weight.detach().flatten() for weight in policy.weights.trainable().values()])
        found.append((forest.leaves, stats.ratio[0], weights))
        assert (stats.ratio[0] - 1).abs().max() <= 1e-4
        assert any(masks for _, masks in forwards) is not splits
    (theirs, _, before), (ours, _, after) = found
    assert (theirs - ours).abs().max() <= 1e-4 * theirs.abs().max()
    assert (before - after).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen_image", "ltx"])
def test_passes_of_an_update_run_once_for_each_length(folders, monkeypatch, name):
    """Rows of several steps stand prompt after prompt, and a negative prompt is longer than all, or counts for nothing
    in what a row costs.
    """
    recipe = recipe_of(folders, name, True, guidance_scale=2.0, lora=LORA, negative_prompt="not that, " * 20)
    policy = Policy.load(recipe, CPU)
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    plan, rows = plan_and_coefficients(recipe)
    prompts = policy.encode([TEXTS[0], TEXTS[1], TEXTS[2]])
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=0, iteration=0)
    scores = np.random.default_rng(0).random((3, plan.leaves, 1))
    forwards, alike, inner = watched(policy), [], Policy.velocity

    def velocity(self, x, sigma, prompts, prompt_of, on_host):
        lengths = np.concatenate(np.split(prompts.masked_lengths[on_host], 2, axis=1))
        alike.append((len(x), len(np.unique(lengths, axis=0))))
        return inner(self, x, sigma, prompts, prompt_of, on_host)

    monkeypatch.setattr(Policy, "velocity", velocity)
    updater.run([Rolled(policy, forest, prompts, assign_credit(plan, recipe.credit, scores, [1.0]), rows)])
    assert len(forwards) == sum(kinds for _, kinds in alike)
    assert max(rows for rows, _ in alike) >= 5, "of several steps and prompts"
    assert max(kinds for _, kinds in alike) >= 3


def test_a_row_costs_its_own_tokens(folders):
    policy = Policy.load(recipe_of(folders, "qwen_image", True, guidance_scale=2.0), CPU)
    prompts, size = policy.encode([TEXTS[0], TEXTS[3], TEXTS[4], TEXTS[0]]), policy.adapter.geometry
    own, away = prompts.masked_lengths.T
    assert prompts.tokens.tolist() == (2 * size.picture_tokens + own + away).tolist()
    assert prompts.unguided().tokens.tolist() == (size.picture_tokens + own).tolist()
    assert len(set(own)) == 2
    assert policy.blank_prompt().tokens == [2 * size.tokens]
    glyphs = Policy.load(recipe_of(folders, "hunyuan_video15", True), CPU)
    prompts, size = glyphs.encode(TEXTS), glyphs.adapter.geometry
    assert prompts.tokens.tolist() == (size.picture_tokens + prompts.masked_lengths.sum(1)).tolist()
    ltx = Policy.load(recipe_of(folders, "ltx", True), CPU)
    assert set(ltx.encode(TEXTS).tokens) == {ltx.adapter.geometry.picture_tokens}


def test_prompts_keep_their_lengths_in_part_and_without_guidance(folders):
    policy = Policy.load(recipe_of(folders, "hunyuan_video15", True, guidance_scale=3.5), CPU)
    prompts = policy.encode(TEXTS)
    assert prompts.masked_lengths.shape == (len(TEXTS), 4)  # of Qwen's text and of ByT5's, twice
    assert (prompts.masked_lengths[:, 1] > 0).tolist() == [False, True, False, False, False]
    assert np.array_equal(prompts[1:3].masked_lengths, prompts.masked_lengths[1:3])
    assert np.array_equal(prompts.unguided().masked_lengths, prompts.masked_lengths[:, :2])
    empty = prompts.masked_lengths[2, :2]
    assert (prompts.masked_lengths[:, 2:] == empty).all()  # the negative prompt is the empty one


def test_conditioning_without_masks_is_cut_to_its_lengths():
    whole = Conditioning(
        {
            "hidden": torch.arange(24.0).view(2, 4, 3),
            "hidden_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]),
            "source_marks": torch.ones(2, 5, 2),
            "source_marks_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2).bool(),
            "source_mask": torch.ones(2, 4),  # of pixels: no sequence of that name
            "pooled": torch.ones(2, 7),
        }
    )
    assert whole.masked_lengths().tolist() == [[3, 2], [3, 2]]
    cut = whole.unmasked([3, 2])
    assert {name: list(tensor.shape) for name, tensor in cut.tensors.items()} == {
        "hidden": [2, 3, 3], "source_marks": [2, 2, 2], "source_mask": [2, 4], "pooled": [2, 7],
    }  # fmt: skip
    assert torch.equal(cut.tensors["hidden"], whole.tensors["hidden"][:, :3])
    assert whole.unmasked().tensors["hidden"].shape == (2, 4, 3)
    assert Conditioning({"hidden": torch.ones(2, 4, 3)}).masked_lengths().shape == (2, 0)


@pytest.mark.parametrize(
    ("name", "text"), [("flux", "reads every text at one length"), ("chroma", "attends to padding, too")]
)
def test_families_without_a_mask_to_leave_out_are_refused(folders, name, text):
    with pytest.raises(UserError, match=f"engine.split_lengths is true, but the {name} transformer {text}: write"):
        Policy.load(recipe_of(folders, name, True), CPU)
    with pytest.raises(UserError, match=text):
        UnloadedModel(recipe_of(folders, name, True))


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"engine": {"cuda_graphs": True}}, "engine.cuda_graphs: true .*each length .*write false, or"),
        ({"engine": {"distributed": "fsdp2"}}, "engine.distributed: fsdp2 .*write ddp, or"),
        ({"rollout": {"cache": {"interval": 2}}}, "rollout.cache .*write null, or"),
    ],
)
def test_what_follows_whole_passes_is_refused(sections, text):
    engine = {"split_lengths": True, **sections.pop("engine", {})}
    with pytest.raises(UserError, match=rf"{text} engine.split_lengths: false$"):
        check_meaning(small_recipe(engine=engine, **sections))


def test_kernels_that_take_no_mask_are_for_split_lengths(folders, monkeypatch):
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    told = {"dtype": "bf16", "lora": LORA}
    for name, split in (("qwen_image", ", or engine.split_lengths: true"), ("chroma", "")):
        text = rf"engine.attention is flash, which takes no mask, .*: write sdpa{split}, or auto$"
        with pytest.raises(UserError, match=text):
            Policy.load(recipe_of(folders, name, False, {"attention": "flash"}, **told), CPU)
    for wanted in ("flash", "sage", "flash_varlen"):
        recipe = with_rollout(recipe_of(folders, "qwen_image", True, **told), attention=wanted)
        Policy.load(recipe, CPU)
    seen = []
    monkeypatch.setattr(QwenImageTransformer2DModel, "set_attention_backend", lambda self, name: seen.append(name))
    for wanted in ("flash", "flash_varlen"):
        Policy.load(recipe_of(folders, "qwen_image", True, {"attention": wanted}, **told), CPU)
    assert seen == ["flash", "flash_varlen"]


def with_rollout(recipe, **keys):
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=keys)})


def test_tuning_measures_it_where_every_row_runs_apart(folders, monkeypatch):
    seen = []

    def seconds_per_row(self, run, rows, repeats=1):
        seen.append((self.policy.splits_lengths, len(self.prompts)))
        return 1.0 if self.policy.splits_lengths else 2.0

    monkeypatch.setattr(Passes, "seconds_per_row", seconds_per_row)
    setup = Setup(recipe_of(folders, "qwen_image", False))
    tuner = tune._Tuner(setup, {}, Work(8, 8, 8), False)
    choice = tuner.split_lengths()
    assert choice.value is True
    assert tuner.policy.splits_lengths
    assert set(seen) == {(False, 1), (True, tuner.rows)}
    assert tuner.rows > 1
    fixed = tune._Tuner(setup, {"cuda_graphs": True}, Work(8, 8, 8), False).split_lengths()
    assert fixed == ("split_lengths", False, ["not measured: not for engine.cuda_graphs: true"], "engine")


@pytest.mark.parametrize("key", ["rollout.attention", "engine.attention"])
def test_tuning_leaves_it_where_a_kernel_may_need_it(folders, monkeypatch, key):
    monkeypatch.setattr(attention, "missing", lambda *_, **__: None)
    engine = {"attention": "flash"} if key == "engine.attention" else {}
    recipe = recipe_of(folders, "qwen_image", True, engine, dtype="bf16", lora=LORA)
    monkeypatch.setattr(QwenImageTransformer2DModel, "set_attention_backend", lambda *_: None)
    if key == "rollout.attention":
        recipe = with_rollout(recipe, attention="flash")
    choice = tune._Tuner(Setup(recipe), engine, Work(8, 8, 8), False).split_lengths()
    line = "not measured: the recipe names a kernel of attention, which may need it as it is"
    assert choice == ("split_lengths", True, [line], "engine")


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_passes_for_tuning_run_rows_apart_and_can_be_recorded(folders, guidance):
    recipe = recipe_of(folders, "qwen_image", True, guidance_scale=guidance)
    policy = Policy.load(recipe, CPU)
    halves = 1 if guidance == 1 else 2
    for lengths, expected in ((3, [1] * 3 * halves), (1, [3] * halves)):
        passes, forwards = Passes(policy, runner_of(policy, recipe), lengths), watched(policy)
        x = passes.states(3)
        with HostWaits(recording=True) as waits:
            passes.forward(x)
        assert waits.noted == []
        assert [rows for rows, _ in forwards] == expected
        del policy.adapter.velocity


def test_a_run_may_go_on_with_it_or_without(folders):
    with_, without = (Setup(recipe_of(folders, "qwen_image", splits)) for splits in (True, False))
    for setup in (with_, without):
        setup.__dict__["prompts"] = ["a cat"]
    assert with_.fingerprint == without.fingerprint


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen_image", "ltx"])
@torch.no_grad()
def test_compiled_blocks_hold_for_all_lengths(folders, monkeypatch, fresh_dynamo, name):
    """Of one token, too, which is LTX-Video's empty prompt."""
    graphs = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    recipe = recipe_of(folders, name, True, {"compile": True}, guidance_scale=3.5)
    policy = Policy.load(recipe, CPU)
    compile_ahead(policy, recipe, 8)
    before, prompts = len(graphs), policy.encode(TEXTS)
    for order in ([0, 3, 4], [2], [1, 1, 1, 0]):
        x = torch.randn(len(order), *policy.adapter.latent_shape)
        sigma, rows = torch.full((len(order),), 0.5), np.array(order)
        policy.velocity(x, sigma, prompts, torch.from_numpy(rows), rows)
    assert len(graphs) == before > 0
    assert prompts.masked_lengths.min() == policy.adapter.shortest_text or name == "qwen_image"
