"""What ranks are left with: prompts, passes, rows of weights, memory, and what they send."""

import json
import re

import pytest
from torch import nn

from engine_cases import refuse, strict_json, succeed, tiny_recipe
from flowgrove.errors import UserError
from flowgrove.models.policy import Policy
from flowgrove.plan.communication import predict_communication
from flowgrove.plan.division import ALONE, Division
from flowgrove.plan.memory import Fit, MemoryModel
from flowgrove.plan.planner import make_plan
from flowgrove.plan.weight_sizes import WeightSizes
from flowgrove.ranks import Ranks
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from policy_cases import CPU, small_recipe
from torchrun import torchrun

LORA = {"rank": 2, "alpha": 4}
SD3 = {"adapter": "sd3", "path": "tiny", "gradient_checkpointing": True}


def model_of(division=ALONE, update=None, engine=None, device="cpu", prompts=6, **model):
    recipe = small_recipe(
        model={**SD3, **model},
        data={"prompts": "unused.txt", "prompts_per_iteration": prompts},
        update={"updates_per_iteration": 2, **(update or {})},
        engine={"device": "cpu", **(engine or {})},
    )
    return MemoryModel(recipe, make_plan(recipe, 0), device, division)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("sizes", [None, [[32, 32], [32, 16]], [[32, 32], [32, 16], [16, 16]]])
def test_every_rank_gets_the_prompts_that_a_run_gives_it(ranks, sizes):
    recipe = small_recipe(model={**SD3, "sizes": sizes}, data={"prompts": "unused.txt", "prompts_per_iteration": 11})
    count = len(sizes or [None])
    counts = [len(range(11)[size::count]) for size in range(count)]
    found = Division(ranks).prompts(recipe)
    assert sum(found) == 11
    assert max(found) - min(found) <= 1
    for rank, prompts in enumerate(found):
        shares = Ranks(rank, ranks).shares(counts)
        assert prompts == sum(len(range(some)[share]) for some, share in zip(counts, shares, strict=True))


def test_the_work_of_the_ranks_is_that_of_the_iteration():
    recipe = small_recipe(data={"prompts": "unused.txt", "prompts_per_iteration": 7})
    plan = make_plan(recipe, 0)
    most, fewest = Division(3).work(recipe, plan)
    assert (most.prompts, fewest.prompts) == (3, 2)
    assert most.rollout_forwards == 3 * plan.counts.rollout_forwards
    assert fewest.train_passes == 2 * plan.counts.train_passes
    unshared = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"share": False})})
    assert Division(3).work(unshared, plan)[0].rollout_forwards == 3 * plan.counts.unshared_rollout_forwards


class Net(nn.Module):
    """Two blocks of 5 · 3 + 5 and 5 · 5 + 5 weights, and 7 · 3 + 7 before them; a norm's 2 · 5 are nobody's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 7)
        self.blocks = nn.ModuleList([nn.Linear(3, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5)), nn.Linear(1, 1)])


def test_rows_of_a_small_model_by_hand():
    """Among 2: 4 of 7 rows, 3 of 5 and 1 of 1, each with its bias."""
    net = Net()
    sizes = WeightSizes.of(net, 2, lora=False)
    first, blocks = 4 * 3 + 4, (3 * 3 + 3, 3 * 5 + 3, 1 + 1)
    assert sizes.trained_rows == first + sum(blocks)
    assert sizes.trained_whole == 10
    assert sizes.gathered == sizes.gathered_trained == 2 * sizes.trained_rows
    assert sizes.at_once == 2 * (first + blocks[0] + blocks[1])
    assert sizes.largest_block == 2 * blocks[1]
    assert sizes.frozen_rows == 0
    frozen = WeightSizes.of(net.requires_grad_(False), 2, lora=True)
    assert (frozen.frozen_rows, frozen.trained, frozen.gathered) == (sizes.trained_rows, 0, sizes.gathered)
    whole = WeightSizes.of(net.requires_grad_(True), None, lora=False)
    assert whole.trained == whole.trained_whole == sum(weight.numel() for weight in net.parameters())
    assert (whole.gathered, whole.at_once, whole.divided) == (0, 0, frozenset())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_of_all_weights_take_what_fsdp_holds(dtype):
    """The tiny SD3's layers, cut by hand."""
    update = {"kl_weight": 0.1, "ema_decay": 0.9}
    found = model_of(Division(3, 3), update, dtype=dtype).at(4096)
    transformer = Policy.load(small_recipe(model={**SD3, "dtype": "fp32"}), CPU).transformer
    layers = [layer for layer in transformer.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
    rows = sum(-(-weight.shape[0] // 3) * weight[0].numel() for weight in weights)
    rest = sum(w.numel() for w in transformer.parameters()) - sum(weight.numel() for weight in weights)
    compute = {"fp32": 4, "bf16": 2}[dtype]
    assert found.resident["gradients"] == found.resident["averaged weights"] == 4 * (rows + rest)
    assert found.resident["optimiser"] == 8 * (rows + rest)
    assert found.resident["untouched copy"] == compute * (rows + rest)
    assert found.resident["untouched copy, gathered"] == compute * 3 * rows
    buffers = sum(buffer.nbytes for buffer in transformer.buffers())
    assert found.resident["transformer"] + found.resident["master weights"] == 4 * (rows + rest) + buffers
    assert found.stages["adding gradients up"] == 4 * rest + compute * 3 * rows


def test_gathered_weights_lie_beside_the_stages_that_need_them():
    alone = model_of(dtype="bf16", prompts=2).at(4096)
    model = model_of(Division(3, 3), dtype="bf16")  # 2 prompts of 6 each
    kept, resharding = model.at(4096), model.at(4096, reshard=True)
    assert kept.stages["rollout"] == resharding.stages["rollout"] == alone.stages["rollout"] + model.gathered
    assert kept.stages["decoding"] == alone.stages["decoding"] + model.gathered
    on_their_way = 2 * model.sizes.largest_block * (2 + 4)
    assert kept.stages["training"] == alone.stages["training"] + model.gathered + on_their_way
    assert resharding.stages["training"] == alone.stages["training"] + 2 * model.sizes.at_once + on_their_way
    assert model.sizes.at_once < model.sizes.gathered


def test_lora_divides_what_is_frozen():
    alone, model = model_of(lora=LORA, dtype="bf16", prompts=2), model_of(Division(3, 3), lora=LORA, dtype="bf16")
    whole, divided = alone.at(4096), model.at(4096)
    for name in ("gradients", "optimiser", "master weights"):
        assert divided.resident[name] == whole.resident[name]
    assert model.sizes.trained_rows == 0
    assert divided.resident["transformer"] < whole.resident["transformer"]
    assert divided.stages["training"] == whole.stages["training"] + model.gathered
    assert divided.stages["adding gradients up"] == model.gathered + whole.resident["gradients"]


def test_ddp_adds_a_copy_of_the_gradients_and_divides_what_prompts_take():
    alone, divided = model_of(prompts=2, dtype="fp32").at(4096), model_of(Division(3), dtype="fp32").at(4096)
    assert divided.resident == alone.resident
    assert divided.stages == {**alone.stages, "adding gradients up": alone.resident["gradients"]}
    assert model_of(Division(1), prompts=2, dtype="fp32").at(4096) == alone


def test_a_reference_model_is_gathered_too_where_evaluation_ends_with_it():
    division, run = Division(2, 2), {"eval": {"tuned_share": 0.5}}
    recipe = small_recipe(model={**SD3, "dtype": "fp32"}, run=run)
    model = MemoryModel(recipe, make_plan(recipe, 0), "cpu", division)
    stages = model.at(4096).stages
    assert stages["evaluation"] == stages["rollout"] + model.gathered
    assert predict_communication(model, 4096).evaluation == model.gathered  # two of them, each a half


def test_what_ranks_send_by_hand():
    tokens = 10**9
    ddp = model_of(Division(3), dtype="fp32")
    gradients = 4 * ddp.sizes.trained
    assert predict_communication(ddp, tokens).iteration == {"gradients added up": 2 * 2 * (gradients * 2 // 3)}
    assert predict_communication(model_of(dtype="fp32"), tokens).total == 0
    model = model_of(Division(3, 3), dtype="bf16", engine={"token_budget": 1})
    assert model.passes_of_update(tokens) == 1
    weights, sizes = 2 * model.sizes.gathered, model.sizes
    kept = predict_communication(model, tokens)
    whole = 2 * (4 * sizes.trained_whole * 2 // 3)
    scattered = 4 * sizes.gathered_trained * 2 // 3
    assert kept.iteration == {
        "weights gathered": 2 * (weights * 2 // 3),
        "gradients divided": 2 * scattered,
        "gradients added up": 2 * whole,
    }
    assert kept.evaluation == weights * 2 // 3
    resharding = predict_communication(model, tokens, reshard=True)
    gathers = 1 + 2 * 2 + 1  # rollout; two passes forward and back; the old policy's of the second update
    assert resharding.iteration == {**kept.iteration, "weights gathered": gathers * (weights * 2 // 3)}
    small = predict_communication(model, 1, reshard=True)
    passes = model.passes_of_update(1)
    assert small.iteration["gradients divided"] == 2 * passes * scattered
    assert small.iteration["weights gathered"] == (1 + 5 * passes) * (weights * 2 // 3)


def test_copies_of_a_division_add_up_their_rows():
    model = model_of(Division(6, 2), dtype="fp32")
    sizes = model.sizes
    found = predict_communication(model, 10**9).iteration
    whole, rows = 2 * (4 * sizes.trained_whole * 5 // 6), 2 * (4 * sizes.trained_rows * 2 // 3)
    assert found["gradients added up"] == 2 * (whole + rows)
    assert found["gradients divided"] == 2 * (4 * sizes.gathered_trained // 2)


@pytest.mark.long
def test_the_largest_passes_that_fit_are_found():
    model = model_of(Division(2, 2), dtype="fp32")
    row = model.geometry.tokens
    automatic = 1 << ((4096 // row).bit_length() - 1)
    peaks = {(rows, reshard): model.at(rows * row, reshard).peak for rows in (1, 2, automatic) for reshard in (0, 1)}

    def found(peak, foreign=0):
        return model.fitting(int((peak + 1) / 0.9) + 1, foreign)

    assert found(peaks[automatic, 0]) == Fit(automatic * row, False)
    assert found(peaks[1, 1]) == Fit(row, True)
    assert found(peaks[1, 1] - 1000) is None
    assert found(peaks[2, 1] + 777, foreign=777).tokens >= 2 * row
    assert model_of(dtype="fp32").fitting(10**12) == Fit(automatic * row, False)
    stated = model_of(Division(2, 2), dtype="fp32", engine={"token_budget": 123})
    assert stated.fitting(10**12).tokens == 123


def test_a_recipe_says_how_ranks_divide_a_run():
    def of(ranks, **engine):
        return Division.of(small_recipe(engine=engine).engine, ranks)

    assert (of(1), of(3, distributed="ddp"), of(3, distributed="fsdp2")) == (ALONE, Division(3), Division(3, 3))
    assert of(6, distributed="fsdp2", shard_degree=2) == Division(6, 2)
    with pytest.raises(UserError, match="does not divide 6 ranks"):
        of(6, distributed="fsdp2", shard_degree=4)


def test_a_recipe_that_leaves_nothing_open_is_predicted_in_one_way():
    division = Division(2, 2)
    for wanted in (True, False):
        model = model_of(division, engine={"reshard_after_forward": wanted}, dtype="fp32")
        assert model.ways == (wanted,)
        assert model.fitting(10**12).reshard == wanted
    assert model_of(Division(2), engine={"reshard_after_forward": True}, dtype="fp32").ways == (False,)


def test_a_plan_shows_both_ways_to_gather(tmp_path):
    recipe = tiny_recipe(tmp_path, data={"prompts_per_iteration": 4})
    fsdp = ("--set", "engine.distributed=fsdp2", "--ranks", 2, "--memory")
    told = succeed("plan", recipe, *fsdp).stdout
    assert "engine.reshard_after_forward" in told
    assert "weights gathered" in told
    kept, resharding = strict_json(succeed("plan", recipe, *fsdp, "--json").stdout)["memory"]
    assert (kept["reshard_after_forward"], resharding["reshard_after_forward"]) == (False, True)
    assert kept["stages"]["training"] > resharding["stages"]["training"]
    assert kept["sent"]["weights gathered"] < resharding["sent"]["weights gathered"]


def test_a_plan_says_what_ranks_do(tmp_path):
    recipe = tiny_recipe(tmp_path, data={"prompts_per_iteration": 7}, model={"lora": LORA})
    assert "engine.distributed is none" in refuse("plan", recipe, "--ranks", 3)
    ddp = ("--set", "engine.distributed=ddp", "--ranks", 3)
    told = succeed("plan", recipe, *ddp, "--memory").stdout
    assert "each of 3 ranks" in told
    assert "adding gradients up" in told
    assert "predicted bytes that it sends" in told
    found = strict_json(succeed("plan", recipe, *ddp, "--memory", "--json").stdout)
    counts = found["counts"]
    assert found["ranks"] == {
        "ranks": 3,
        "shards": None,
        "most": {
            "prompts": 3,
            "rollout_forwards": 3 * counts["rollout_forwards"],
            "train_passes": 3 * counts["train_passes"],
        },
        "fewest": {
            "prompts": 2,
            "rollout_forwards": 2 * counts["rollout_forwards"],
            "train_passes": 2 * counts["train_passes"],
        },
    }
    (memory,) = found["memory"]
    assert memory["peak"] == sum(memory["resident"].values()) + max(memory["stages"].values())
    assert memory["sent"]["gradients added up"] > 0
    alone = strict_json(succeed("plan", recipe, "--json").stdout)
    assert not {"ranks", "memory"} & set(alone)


HELD = """
import json
import sys
from pathlib import Path

from flowgrove.device import pick_device
from flowgrove.models.policy import Policy
from flowgrove.joining import joined
from flowgrove.recipe.loading import load_recipe

recipe = load_recipe(Path(sys.argv[1]), tuple(sys.argv[2:]))
with joined(recipe.engine, pick_device(recipe)) as ranks:
    weights = Policy.load(recipe, pick_device(recipe), (), ranks).weights
    divided = weights.sharded[0]._divided
    trained = {name: weight.numel() for name, weight in weights.trainable().items()}
    found = {
        "trained": sum(trained.values()),
        "trained_rows": sum(trained[name] for name in weights.pieces),
        "frozen_rows": sum(w.to_local().numel() for name, w in divided.items() if name not in weights.pieces),
        "names": sorted(divided),
    }
    if ranks.first:
        print("held", json.dumps(found))
"""


@pytest.mark.long
@pytest.mark.parametrize("lora", [None, LORA])
def test_rows_are_those_that_fsdp_gives_the_first_rank(tmp_path, lora):
    recipe = tiny_recipe(tmp_path, model={"lora": lora, "dtype": "bf16"}, engine={"distributed": "fsdp2"})
    (tmp_path / "held.py").write_text(HELD)
    text = torchrun(2, tmp_path / "held.py", recipe, output=tmp_path / "log")
    found = json.loads(re.search("^held (.*)$", text, re.MULTILINE)[1])
    setup = Setup(load_recipe(recipe))
    sizes = setup.memory("cpu", Division(2, 2)).sizes
    assert found.pop("names") == sorted(sizes.divided)
    assert found == {name: getattr(sizes, name) for name in found}
