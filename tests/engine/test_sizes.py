"""model.sizes: prompts of several sizes in one iteration, each size a bucket of its own, all in the same updates."""

import numpy as np
import pytest
import torch

from engine_cases import refuse, succeed, tiny_recipe
from flowgrove.credit import assign_credit, part_of
from flowgrove.errors import UserError
from flowgrove.iteration import Stages
from flowgrove.models.policy import Policy
from flowgrove.recipe.loading import parse_recipe
from flowgrove.rewards.registry import Rewards
from flowgrove.rollout.loop import rollout
from flowgrove.run.metrics import read_metrics
from flowgrove.setup import Setup
from flowgrove.update.passes import Rolled
from flowgrove.update.updater import Updater
from policy_cases import CPU, TEXTS, plan_and_coefficients, runner_of, small_recipe
from update_cases import Recorder

SIZES = [[32, 32], [16, 32]]
MODEL = {"sizes": SIZES}


def test_every_bucket_is_the_rollout_of_a_recipe_of_that_size(monkeypatch):
    recipe = small_recipe(model=MODEL)
    policy, seen = Policy.load(recipe, CPU), []
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    monkeypatch.setattr(
        updater, "run", lambda parts, whole, inner=updater.run: (seen.extend(parts), inner(parts, whole))[1]
    )
    line = Stages(Setup(recipe), policy, updater, Rewards(recipe, CPU)).run(TEXTS, 0)
    assert [part.prompts.texts for part in seen] == [[TEXTS[0], TEXTS[2]], [TEXTS[1]]]
    assert line["rollout_forwards"] == seen[0].forest.plan.counts.rollout_forwards * len(TEXTS)
    for part, (height, width), first in zip(seen, SIZES, (0, 2), strict=True):
        alone = small_recipe(model={"height": height, "width": width})
        plan, rows = plan_and_coefficients(alone)
        other = Policy.load(alone, CPU)
        expected = rollout(
            plan,
            rows,
            other,
            other.encode(part.prompts.texts),
            runner_of(other),
            seed=recipe.run.seed,
            iteration=0,
            first_prompt=first,
        )
        assert expected.leaves.shape[-2:] == (height // 4, width // 4)
        assert torch.allclose(part.forest.leaves, expected.leaves, rtol=0, atol=1e-11)


@pytest.mark.parametrize("keeps", [True, False])
def test_an_update_over_buckets_is_the_mean_over_all_their_edges(keeps):
    recipe = small_recipe(
        model=MODEL, update={"updates_per_iteration": 1}, engine={"device": "cpu", "reuse_rollout_graph": keeps}
    )
    policy = Policy.load(recipe, CPU)
    plan, rows = plan_and_coefficients(recipe)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    room = Stages(Setup(recipe), policy, Recorder(recipe, policy), Rewards(recipe, CPU)).room

    def parts():
        found = []
        for sized, texts, first in zip(recipe.at_sizes(), (TEXTS[:2], TEXTS[2:]), (0, 2), strict=True):
            view = policy.sized(sized)
            prompts = view.encode(texts)
            forest = rollout(
                plan,
                rows,
                view,
                prompts,
                runner_of(policy),
                seed=1,
                iteration=0,
                first_prompt=first,
                retained=room.retained_graphs(policy, runner_of(policy)),
            )
            assert bool(forest.retained) == keeps
            found.append(Rolled(view, forest, prompts, part_of(credit, slice(first, first + len(texts))), rows, first))
        return found

    def gradient(some):
        recorder = Recorder(recipe, policy)
        stats = recorder.run(some)
        return torch.cat([g.flatten() for g in recorder.gradients[0]]), float(torch.stack(stats.loss).sum())

    together, loss = gradient(parts())
    (first, first_loss), (second, second_loss) = gradient(parts()[:1]), gradient(parts()[1:])
    assert float((together - (2 * first + second) / 3).norm()) <= 1e-10 * float(together.norm())
    assert loss == pytest.approx((2 * first_loss + second_loss) / 3, rel=1e-10)
    assert float(second.norm()) > 1e-6


def test_a_run_of_two_sizes_trains_evaluates_and_resumes(tmp_path):
    path = tiny_recipe(tmp_path, model=MODEL)
    succeed("train", path, "--out", tmp_path / "run")
    assert "height: 32" in (tmp_path / "run" / "recipe.yaml").read_text()
    succeed("eval", tmp_path / "run")
    succeed("train", path, "--out", tmp_path / "run", "--set", "run.iterations=4")
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_first_size_is_drawn_by_evaluation_unless_a_size_is_given():
    assert (small_recipe(model=MODEL).model.height, small_recipe(model=MODEL).model.width) == (32, 32)
    assert small_recipe(model={**MODEL, "height": 16, "width": 16}).model.height == 16


@pytest.mark.parametrize("sizes", [[], [[32]], [[32, 0]], "32x32"])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(UserError, match="sizes"):
        parse_recipe(
            {
                "model": {"adapter": "sd3", "path": "tiny", "sizes": sizes},
                "data": {"prompts": "p"},
                "reward": [{"name": "shapes"}],
            }
        )


def test_a_size_that_the_model_cannot_draw_is_told_before_training(tmp_path):
    told = refuse("train", tiny_recipe(tmp_path, model={"sizes": [[32, 32], [30, 32]]}), "--out", tmp_path / "run")
    assert "multiple of" in told
