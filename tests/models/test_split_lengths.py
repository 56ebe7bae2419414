"""engine.split_lengths: texts of each length run apart, without masks, and give what they give padded and masked."""

import numpy as np
import pytest
import torch

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
from policy_cases import CPU, encoded, plan_and_coefficients, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS

NAMES = [name for name in ("qwen_image", "z_image", "hunyuan_video15", "ltx", "qwen_image21") if name in FAMILIES]
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


def apart(prompts):
    """The lengths of rows with guidance, the unconditional ones behind."""
    half = prompts.apart.shape[1] // 2
    return np.concatenate([prompts.apart[:, :half], prompts.apart[:, half:]])


@pytest.mark.parametrize("name", NAMES)
def test_velocities_and_gradients_are_those_of_masked_rows(folders, name):
    found = []
    order = torch.tensor([0, 0, 3, 1, 2, 2, 4])
    for splits in (False, True):
        policy = Policy.load(recipe_of(folders, name, splits, guidance_scale=3.5, lora=LORA), CPU)
        for number, weight in enumerate(policy.weights.trainable().values()):
            torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(number))
        policy.weights.refresh()
        prompts, forwards = policy.encode(TEXTS), watched(policy)
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
    lengths = apart(prompts)[np.concatenate([order, order + len(TEXTS)])]
    runs = 1 + (lengths[1:] != lengths[:-1]).any(1).sum()
    assert len({tuple(row) for row in lengths}) >= 3
    assert len(forwards) == runs < 14
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


def test_rows_of_one_length_stand_beside_each_other(folders):
    """The packer sorts by what a row costs, which is then its own length, not a padded one."""
    policy = Policy.load(recipe_of(folders, "qwen_image", True), CPU)
    prompts = policy.encode([TEXTS[0], TEXTS[3], TEXTS[4], TEXTS[0]])
    size = policy.adapter.geometry
    assert prompts.apart[:, 0].tolist() == prompts.lengths.tolist()
    assert prompts.tokens.tolist() == (size.picture_tokens + prompts.lengths).tolist()
    (rows,) = runner_of(policy, recipe_of(folders, "qwen_image", True)).budget.passes(prompts.tokens)
    lengths = prompts.lengths[rows].tolist()
    assert lengths == sorted(lengths, reverse=True)


def test_prompts_keep_their_lengths_in_part_and_without_guidance(folders):
    policy = Policy.load(recipe_of(folders, "hunyuan_video15", True, guidance_scale=3.5), CPU)
    prompts = policy.encode(TEXTS)
    assert prompts.apart.shape == (len(TEXTS), 4)  # of Qwen's text and of ByT5's, twice
    assert (prompts.apart[:, 1] > 0).tolist() == [False, True, False, False, False]
    assert np.array_equal(prompts[1:3].apart, prompts.apart[1:3])
    assert np.array_equal(prompts.unguided().apart, prompts.apart[:, :2])
    empty = prompts.apart[2, :2]
    assert (prompts.apart[:, 2:] == empty).all()  # the negative prompt is the empty one


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
        recipe = recipe_of(folders, "qwen_image", True, **told)
        recipe = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"attention": wanted})})
        Policy.load(recipe, CPU)


def test_tuning_measures_it_where_every_row_runs_apart(folders, monkeypatch):
    seen = []

    def seconds_per_row(self, run, rows, repeats=1):
        seen.append((self.policy.splits_lengths, len(self.prompts), rows))
        return 1.0 if self.policy.splits_lengths else 2.0

    monkeypatch.setattr(Passes, "seconds_per_row", seconds_per_row)
    recipe = recipe_of(folders, "qwen_image", False)
    tuner = tune._Tuner(Setup(recipe), {}, Work(8, 8, 8), False)
    choice = tuner.split_lengths()
    assert choice.value is True
    assert tuner.policy.splits_lengths
    assert {(True, 2), (False, 1)} == {(splits, prompts) for splits, prompts, _ in seen}
    fixed = tune._Tuner(Setup(recipe), {"cuda_graphs": True}, Work(8, 8, 8), False).split_lengths()
    assert fixed.value is False
    assert fixed.lines == ["not measured: not for engine.cuda_graphs: true"]


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_passes_for_tuning_run_each_row_apart(folders, guidance):
    recipe = recipe_of(folders, "qwen_image", True, guidance_scale=guidance)
    policy = Policy.load(recipe, CPU)
    passes, forwards = Passes(policy, runner_of(policy, recipe), apart=True), watched(policy)
    passes.forward(passes.states(3))
    assert [rows for rows, _ in forwards] == [1] * (3 if guidance == 1 else 6)


@pytest.mark.long
@torch.no_grad()
def test_compiled_blocks_hold_for_all_lengths(folders, monkeypatch, fresh_dynamo):
    graphs = []
    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    recipe = recipe_of(folders, "qwen_image", True, {"compile": True}, guidance_scale=3.5)
    policy = Policy.load(recipe, CPU)
    compile_ahead(policy, recipe, 8)
    before, prompts = len(graphs), policy.encode(TEXTS)
    for order in ([0, 3, 4], [2], [1, 1, 1, 0]):
        x = torch.randn(len(order), *policy.adapter.latent_shape)
        sigma, rows = torch.full((len(order),), 0.5), np.array(order)
        policy.velocity(x, sigma, prompts, torch.from_numpy(rows), rows)
    assert len(graphs) == before > 0
