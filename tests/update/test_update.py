"""The updates: merged and packed passes give the losses and gradients of the naive loop, one edge at a time."""

import math
from dataclasses import replace
from itertools import compress

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowgrove.credit import assign_credit
from flowgrove.models.experts import expert_of
from flowgrove.models.families.qwen_image import QwenImage
from flowgrove.models.policy import Policy
from flowgrove.rollout.loop import rollout
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.update.passes import Rolled, step_weights
from flowgrove.update.updater import Updater, learning_rate
from flowgrove_kernels import NoiseKey, philox_normal, use_backend
from host_reads import count_host_reads
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from tiny_families import FAMILIES, MODELS, sampled
from update_cases import CASES, TREE, Recorder, policy_with_reference


def rolled_out(recipe, policy, seed=0):
    """A forest whose stored logp is a little off, as after an earlier update,
    and random credit with one prompt without signal.
    """
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=recipe.run.seed, iteration=0)
    generator = np.random.default_rng(seed)
    forest.logp += torch.from_numpy(1e-3 * generator.standard_normal(len(forest.logp)))
    scores = generator.random((len(TEXTS), plan.leaves, 1))
    scores[1] = 0.5
    return forest, prompts, assign_credit(plan, recipe.credit, scores, [1.0]), rows


def naive_update(recipe, policy, forest, prompts, credit, rows, number):
    """Loss and gradient of one update, every edge a batch of one, written from MATH §3 with plain autograd."""
    plan, update = forest.plan, recipe.update
    weights = step_weights(plan, update.step_weight)
    low, high = update.clip_range if isinstance(update.clip_range, tuple) else (update.clip_range,) * 2
    edges = []
    for step in plan.trained_steps:
        trains, advantage = credit[step.index].trains, credit[step.index].advantage
        for prompt in range(forest.prompts):
            for child in range(step.nodes_out):
                leader = child - child % step.fanout if update.partition == "parents" else child
                if update.edges_per_update is None:
                    mine = (leader * plan.leaves // step.nodes_out) * plan.updates // plan.leaves
                else:
                    mine = plan.update_of_edge(step, child)  # drawn: tests/plan says how
                if trains[prompt, child] and mine == number:
                    edges.append((step, prompt, child, advantage[prompt, child]))
    total = 0.0
    for step, prompt, child, advantage in edges:
        x = forest.states[forest.first_row[step.index] + prompt * step.nodes_in + child // step.fanout][None]
        edge = forest.first_row[step.index + 1] + prompt * step.nodes_out + child
        x_next = forest.states[edge][None]
        sigma = torch.tensor([step.sigma], dtype=torch.float32)
        prompt_of = torch.tensor([prompt])
        a, b, s, kappa, log_norm = (
            t[step.index].double() for t in (rows.x_coef, rows.v_coef, rows.std, rows.precision, rows.log_norm)
        )

        scale = policy.of_expert(step.expert).guidance_scale

        def guided(velocity):
            v, uncond, _ = velocity
            if uncond is not None and update.detach_unconditional:
                uncond = uncond.detach()
            return v if uncond is None else uncond + scale * (v - uncond)  # noqa: B023

        v = guided(policy.of_expert(step.expert).velocity(x, sigma, prompts, prompt_of))
        residual = x_next - (a * x + b * v)
        logp = log_norm - kappa * (residual**2).mean()
        if number == 0:
            ratio = torch.exp(logp - logp.detach())
            if update.step_weight == "guard":
                z = noise_of(recipe, plan, step, prompt, child, x.shape)
                ratio = torch.exp((b * z * (v - v.detach())).mean())  # mean z⊙Δμ with Δμ = 0 in value
        elif update.step_weight == "guard":
            z = noise_of(recipe, plan, step, prompt, child, x.shape)
            ratio = torch.exp(s * (z * z).mean() - (z * residual).mean())
        else:
            ratio = torch.exp(logp - forest.logp[edge])
        surrogate = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
        kl = 0.0
        if update.kl_weight:
            with torch.no_grad(), policy.reference() as untrained:
                reference = guided(untrained.of_expert(step.expert).velocity(x, sigma, prompts, prompt_of))
            kl = b**2 * ((v - reference) ** 2).mean() / (2 * s**2)
        loss = weights[step.index] / len(edges) * (surrogate + update.kl_weight * kl)
        loss.backward()
        total += loss.item()
    return total, len(edges)


def noise_of(recipe, plan, step, prompt, child, shape):
    """As the reference draws it: float64 takes that on every backend."""
    rho, parent = plan.sibling_correlation, child // step.fanout
    with use_backend("reference"):
        own = philox_normal(shape, NoiseKey(recipe.run.seed, 0, step.index, prompt, child)).double()
        shared = philox_normal(shape, NoiseKey(recipe.run.seed, 0, step.index + 2**31, prompt, parent)).double()
    return (math.sqrt(rho) * shared.float() + math.sqrt(1 - rho) * own.float()).double() if rho else own


@pytest.mark.parametrize(
    ("case", "guidance"),
    [*((case, 1.0) for case in CASES), *((case, 2.5) for case in ("flat", "tree", "kl", "detached"))],
)
def test_packed_updates_equal_one_edge_at_a_time(case, guidance):
    recipe, policy = small_recipe(**CASES[case]), policy_of(guidance=guidance)
    policy = replace(
        policy, trains_unconditional=not recipe.update.detach_unconditional, halves_apart=recipe.halves_apart
    )
    if recipe.update.kl_weight:
        policy = policy_with_reference(recipe, guidance)
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    recorder = Recorder(recipe, policy)
    stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    losses = iter(stats.loss)
    edges = 0
    for number, packed in enumerate(recorder.gradients):
        naive_loss, count = naive_update(recipe, policy, forest, prompts, credit, rows, number)
        edges += count
        naive = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in recorder.parameters]
        recorder.optimizer.zero_grad(set_to_none=True)
        norm = math.sqrt(sum(float((g**2).sum()) for g in naive))
        difference = math.sqrt(sum(float(((g - h) ** 2).sum()) for g, h in zip(naive, packed, strict=True)))
        assert norm > 1e-6, "an update without gradient proves nothing"
        assert difference <= 1e-10 * norm
        packed_loss = float(next(losses))
        assert packed_loss == pytest.approx(naive_loss, rel=1e-10, abs=1e-12)
    assert edges == sum(int(c.trains.sum()) for c in credit.values()), "every edge trains exactly once"


@pytest.mark.parametrize("case", [pytest.param("tree", marks=pytest.mark.long), "kl"])
def test_packed_updates_of_two_experts_equal_one_edge_at_a_time(folders, case):
    """Each pass runs one expert, at its own guidance scale; in fp32, which the model computes positions in."""
    model = {**MODELS["wan_a14b"], "path": folders["wan_a14b"], "dtype": "fp32", "guidance_scale_2": 1.5}
    sections = {name: dict(keys) for name, keys in CASES[case].items()}
    sections["rollout"] = {**TREE, "shift": 3.0, "tree": {"splits": [0, 3], "fanout": 2}}
    sections["engine"] = {"device": "cpu", "token_budget": 1 << 20}
    recipe = small_recipe(model={**model, "guidance_scale": 2.5, "gradient_checkpointing": False}, **sections)
    policy = policy_with_reference(recipe, 2.5)
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    assert {step.expert for step in forest.plan.trained_steps} == {"high", "low"}
    recorder = Recorder(recipe, policy)
    stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
    assert len(stats.loss) == 2 * len(recorder.gradients), "an update has one pass of each expert"
    for number, packed in enumerate(recorder.gradients):
        naive_loss, _ = naive_update(recipe, policy, forest, prompts, credit, rows, number)
        naive = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in recorder.parameters]
        recorder.optimizer.zero_grad(set_to_none=True)
        for expert in ("high", "low"):
            mine = [expert_of(name)[0] == expert for name in policy.weights.trainable()]
            theirs, ours = (torch.cat([g.flatten() for g in compress(all_of, mine)]) for all_of in (naive, packed))
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm()), expert
            assert float(theirs.norm()) > 1e-6
        packed_loss = sum(float(loss) for loss in stats.loss[2 * number : 2 * number + 2])
        assert packed_loss == pytest.approx(naive_loss, rel=1e-6)


@pytest.mark.parametrize("name", sampled("flux_kontext", names=[one.name for one in FAMILIES.values() if one.sources]))
def test_packed_updates_with_source_pictures_equal_one_edge_at_a_time(folders, name):
    """In fp32, which these models compute positions in; with guidance, whose scale multiplies rounding too, both rows
    read the picture.
    """
    model = {**MODELS[name], "path": folders[name], "dtype": "fp32", "guidance_scale": 2.0}
    sections = {"rollout": {**TREE, "shift": 3.0}, "engine": {"device": "cpu", "token_budget": 1 << 20}}
    recipe = small_recipe(model={**model, "gradient_checkpointing": False}, **sections)
    policy = Policy.load(recipe, CPU)
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    recorder = Recorder(recipe, policy)
    losses = recorder.run([Rolled(policy, forest, prompts, credit, rows)]).loss
    passes = len(losses) // len(recorder.gradients)  # of an update: one of each expert
    for number, packed in enumerate(recorder.gradients):
        naive_loss, _ = naive_update(recipe, policy, forest, prompts, credit, rows, number)
        naive = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in recorder.parameters])
        recorder.optimizer.zero_grad(set_to_none=True)
        assert float(naive.norm()) > 1e-6
        assert float((torch.cat([g.flatten() for g in packed]) - naive).norm()) <= 1e-6 * float(naive.norm())
        packed_loss = sum(float(loss) for loss in losses[passes * number : passes * (number + 1)])
        assert packed_loss == pytest.approx(naive_loss, rel=1e-6)


@pytest.mark.parametrize("apart", [False, True], ids=["halves together", "halves apart"])
@pytest.mark.parametrize("guide", [None, QwenImage.guide], ids=["in the op", "as Qwen-Image does"])
def test_a_detached_unconditional_half_has_no_gradient(guide, apart, monkeypatch):
    """The gradient of the guided velocity is that with an unconditional half from a pass without one."""
    policy, scale = replace(policy_of(guidance=2.5), trains_unconditional=False, halves_apart=apart), 2.5
    prompts, first = encoded(policy), torch.zeros(1, dtype=torch.long)
    x, sigma = torch.randn(1, *policy.adapter.latent_shape, dtype=torch.float64), torch.tensor([0.7])
    if guide is not None:
        monkeypatch.setattr(type(policy.adapter), "guide", guide)
    found = policy.velocity(x, sigma, prompts, first)
    guided = found.v if found.uncond is None else found.uncond + scale * (found.v - found.uncond)
    policy.weights.drop_gradients()
    guided.square().sum().backward()
    weights = list(policy.weights.trainable().values())
    ours = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in weights]
    policy.weights.drop_gradients()
    both = replace(policy, trains_unconditional=True, halves_apart=False)
    v = both.velocity(x, sigma, prompts.unguided(), first).v
    with torch.no_grad():
        uncond = policy.adapter.velocity(x, sigma, prompts.uncond, scale)
    guided = policy.adapter.guide(v, uncond, scale) if guide else uncond + scale * (v - uncond)
    guided.square().sum().backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in weights if p.grad is not None))
    assert norm > 1e-3
    for p, mine in zip(weights, ours, strict=True):
        assert torch.allclose(torch.zeros_like(p) if p.grad is None else p.grad, mine, atol=1e-10 * norm, rtol=0)
    policy.weights.drop_gradients()


def test_halves_that_run_apart_have_one_backward():
    def backward(**settings):
        policy = replace(policy_of(guidance=2.5), trains_unconditional=False, **settings)
        x, sigma = torch.randn(1, *policy.adapter.latent_shape, dtype=torch.float64), torch.tensor([0.7])
        found = policy.velocity(x, sigma, encoded(policy), torch.zeros(1, dtype=torch.long))
        with FlopCounterMode(display=False) as counter:
            (found.v + 2.5 * (found.v - found.uncond)).sum().backward()
        policy.weights.drop_gradients()
        return counter.get_total_flops()

    assert 2 * backward(halves_apart=True) == backward(halves_apart=False) > 0


def test_halves_run_apart_where_one_has_no_gradient_and_nothing_counts_forwards():
    detached = {"update": {"detach_unconditional": True}}
    assert small_recipe(**detached).halves_apart
    assert not small_recipe().halves_apart
    assert not small_recipe(**detached, engine={"distributed": "fsdp2"}).halves_apart
    assert not small_recipe(**detached, rollout={"cache": {"interval": 2}}).halves_apart


@pytest.mark.parametrize("tokens", [40, 200, 4096])
def test_gradients_do_not_depend_on_the_number_of_micro_batches(tokens):
    recipe = small_recipe()
    reference = None
    for policy in (policy_of(), policy_of(tokens=tokens)):
        recorder = Recorder(recipe, policy)
        recorder.run([Rolled(policy, *rolled_out(recipe, policy))])
        flat = torch.cat([g.flatten() for update in recorder.gradients for g in update])
        reference = flat if reference is None else reference
        assert float((flat - reference).norm()) <= 1e-10 * float(reference.norm())


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 6))])
@pytest.mark.parametrize("case", ["flat", "tree"])
def test_losses_and_gradients_do_not_depend_on_how_rows_are_packed(case, seed, monkeypatch):
    """Any division of any rows into passes, in any order:
    in the rollout, in training, and with some of the rollout's graphs kept.
    """
    recipe, found = small_recipe(**CASES[case]), []
    policy = Policy.load(recipe, CPU)
    random = np.random.default_rng(seed)

    def at_random(tokens):
        order = random.permutation(len(tokens))
        cuts = random.choice(np.arange(1, max(len(order), 2)), size=min(max(len(order) - 1, 0), 3), replace=False)
        return [part for part in np.split(order, np.sort(cuts)) if len(part)]

    for packing in (runner_of(policy).budget.passes, at_random):
        monkeypatch.setattr(runner_of(policy).budget, "passes", packing)
        prompts = encoded(policy)
        plan, rows = plan_and_coefficients(recipe)
        retained = RetainedGraphs(int(random.integers(0, 12))) if packing is at_random else None
        forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0, retained=retained)
        credit = assign_credit(
            plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0]
        )
        recorder = Recorder(recipe, policy)
        stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
        found.append(
            (
                forest.leaves,
                torch.cat([g.flatten() for update in recorder.gradients for g in update]),
                float(torch.stack(stats.loss).sum()),
            )
        )
    (leaves, gradient, loss), (others, other, other_loss) = found
    assert torch.allclose(leaves, others, rtol=0, atol=1e-11)
    assert float((gradient - other).norm()) <= 1e-10 * float(gradient.norm())
    assert loss == pytest.approx(other_loss, rel=1e-10)


@pytest.mark.parametrize("case", ["flat", "one_update", "unshared_noise", "parents", "tree", "step_fraction"])
def test_rows_that_train_equal_the_planned_passes(case):
    """With an advantage on every edge, the rows whose backward runs are those that the plan counts."""
    recipe, policy = small_recipe(**CASES[case]), policy_of()
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    for edge in credit.values():
        edge.advantage[:] = 1.0
    seen = []

    def watch(module, arguments, output):
        output[0].register_hook(lambda gradient: seen.append(len(gradient)))

    hook = policy.transformer.register_forward_hook(watch)
    stats = Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    hook.remove()
    assert sum(seen) == stats.train_passes
    if case != "step_fraction":  # there prompts draw their own steps; the plan counts prompt 0
        assert stats.train_passes == forest.plan.counts.train_passes * len(TEXTS)


def test_edges_without_advantage_cost_no_pass_but_count_in_the_mean():
    recipe, policy = small_recipe(update={"updates_per_iteration": 1}), policy_of()
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    stats = Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    assert stats.train_passes == forest.plan.counts.train_passes * (len(TEXTS) - 1), "prompt 1 has no signal"
    only = {index: type(edge)(edge.advantage[[0, 2]], edge.trains[[0, 2]]) for index, edge in credit.items()}
    assert all((edge.advantage != 0).all() for edge in only.values())


def test_first_update_has_ratio_exactly_one_and_later_ones_do_not():
    recipe, policy = small_recipe(), policy_of()
    stats = Recorder(recipe, policy).run([Rolled(policy, *rolled_out(recipe, policy))])
    assert torch.equal(stats.ratio[0], torch.ones_like(stats.ratio[0]))
    assert not torch.equal(stats.ratio[-1], torch.ones_like(stats.ratio[-1]))
    assert float(torch.cat(stats.drift).abs().max()) > 1e-4, "the planted offset of the stored logp must show as drift"


def test_later_updates_in_bf16_compare_with_the_old_policy_in_the_passes_that_they_train_in():
    recipe, policy = small_recipe(), policy_of(dtype="bf16")
    stats = Recorder(recipe, policy).run([Rolled(policy, *rolled_out(recipe, policy))])  # no weight moves
    assert float(torch.cat(stats.drift).abs().max()) > 1e-4, "the planted offset of the stored logp"
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in stats.ratio)


def test_drift_between_rollout_and_training_passes_is_below_the_bound_in_fp32():
    recipe = small_recipe(rollout={"steps": 8, "group_size": 16, "window": {"strategy": "frozen", "size": 3}})
    policy = policy_of(dtype="fp32", tokens=100)
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=3, iteration=0)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    wide = policy_of(dtype="fp32")  # other micro-batches than the rollout's
    stats = Recorder(recipe, wide).run([Rolled(policy, forest, prompts, credit, rows)])
    assert runner_of(wide).budget.rows > runner_of(policy).budget.rows
    assert float(torch.cat(stats.drift).abs().max()) <= 5e-7


def test_no_host_read_in_update():
    recipe, policy = small_recipe(), policy_of(dtype="fp32")
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=3, iteration=0)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    kept = {name: p.detach().clone() for name, p in policy.weights.trainable().items()}
    updater.run([Rolled(policy, forest, prompts, credit, rows)])  # the optimiser's state exists from here on
    assert count_host_reads(lambda: updater.run([Rolled(policy, forest, prompts, credit, rows)])) == 0
    assert any(not torch.equal(p, kept[name]) for name, p in policy.weights.trainable().items())
    with torch.no_grad():
        for name, parameter in policy.weights.trainable().items():
            parameter.copy_(kept[name])


def test_gradient_that_is_not_finite_skips_the_step_and_nothing_else():
    recipe, policy = small_recipe(), policy_of()
    updater = Updater(recipe, policy, runner_of(policy, recipe))
    kept = [p.detach().clone() for p in updater.parameters]
    forest, prompts, credit, rows = rolled_out(recipe, policy)
    forest.states[forest.first_row[1]] = float("nan")
    updater.run([Rolled(policy, forest, prompts, credit, rows)])
    assert all(torch.equal(p, before) for p, before in zip(updater.parameters, kept, strict=True))
    assert all(torch.isfinite(p).all() for p in updater.parameters)


def test_learning_rate_warms_up_and_follows_the_cosine():
    constant = small_recipe(update={"warmup": 3, "lr": 1.0}, run={"iterations": 5})
    assert [learning_rate(constant, n, 2) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = small_recipe(update={"lr_schedule": "cosine", "lr": 1.0}, run={"iterations": 5})
    assert learning_rate(cosine, 0, 2) == 1.0
    assert learning_rate(cosine, 5, 2) == pytest.approx(0.5)
    assert learning_rate(cosine, 9, 2) < 0.03


def test_step_weights_have_mean_one_for_tempflow_and_inverse_dt_for_guard():
    plan, rows = plan_and_coefficients(small_recipe(rollout=TREE))
    tempflow = step_weights(plan, "tempflow")
    assert sum(tempflow.values()) / len(tempflow) == pytest.approx(1.0)
    assert tempflow[1] / tempflow[0] == pytest.approx(float(rows.std[1] / rows.std[0]))
    assert step_weights(plan, "guard")[2] == pytest.approx(1 / (plan.steps[2].sigma - plan.steps[2].sigma_next))
    assert set(step_weights(plan, "uniform").values()) == {1.0}


@pytest.mark.parametrize(
    ("prune", "trained"), [(None, range(5)), ({"kind": "depth", "depths": 2, "first": 1, "stop": 2}, (0, 3, 4))]
)
def test_by_leaves_every_step_counts_alike(prune, trained):
    """Two trees of 4 leaves; the mean is over the edges that train, and pruned depths have none."""
    rollout = {
        "steps": 6, "group_size": 8, "shared_initial_noise": False, "window": {"strategy": "all"},
        "tree": {"splits": [1, 3], "fanout": 2},
    }  # fmt: skip
    plan, _ = plan_and_coefficients(small_recipe(rollout=rollout, credit={"prune": prune}))
    edges, weights = dict(zip(range(5), (2, 4, 4, 8, 8), strict=True)), step_weights(plan, "leaves")
    assert list(weights) == list(trained)
    assert len({round(edges[step] * weight, 12) for step, weight in weights.items()}) == 1
    of_all = [weight for step, weight in weights.items() for _ in range(edges[step])]
    assert sum(of_all) / len(of_all) == pytest.approx(1.0)
    assert weights[0] / weights[4] == pytest.approx(4)  # as the leaves below an edge


@pytest.mark.parametrize("case", ["flat", "one_update"])
def test_by_leaves_a_flat_group_is_weighted_uniformly(case):
    plan, _ = plan_and_coefficients(small_recipe(**CASES[case]))
    assert step_weights(plan, "leaves") == step_weights(plan, "uniform")


@pytest.mark.parametrize("case", ["flat", "tree", "pruned", "tree_guard", "tree_leaves", "roots_unnormalised"])
@pytest.mark.parametrize("engine", [{"share": False}, {"exact_replay": True}], ids=["unshared", "exact_replay"])
def test_unshared_and_replayed_runs_give_the_shared_losses_and_gradients(case, engine):
    shared, other = small_recipe(**CASES[case]), small_recipe(**CASES[case], engine={"device": "cpu", **engine})
    policy, found = policy_of(), []
    for recipe in (shared, other):
        prompts = encoded(policy)
        plan, rows = plan_and_coefficients(recipe)
        forest = rollout(
            plan, rows, policy, prompts, runner_of(policy), seed=recipe.run.seed, iteration=0, share=recipe.engine.share
        )
        credit = assign_credit(
            plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0]
        )
        recorder = Recorder(recipe, policy)
        stats = recorder.run([Rolled(policy, forest, prompts, credit, rows)])
        loss = float(torch.stack(stats.loss).sum())
        found.append(
            (
                forest.leaves,
                torch.cat([g.flatten() for update in recorder.gradients for g in update]),
                loss,
                stats.train_passes,
            )
        )
    (leaves, gradient, loss, passes), (other_leaves, other_gradient, other_loss, other_passes) = found
    assert torch.allclose(leaves, other_leaves, rtol=0, atol=1e-11)
    assert float((gradient - other_gradient).norm()) <= 1e-10 * float(gradient.norm())
    assert loss == pytest.approx(other_loss, rel=1e-10)
    assert other_passes > passes or case == "pruned"  # there no two kept edges have a state in common


@pytest.mark.parametrize("case", ["flat", "tree"])
def test_unshared_rows_equal_the_planned_counts_of_the_published_loop(case):
    recipe, policy = small_recipe(**CASES[case], engine={"device": "cpu", "share": False}), policy_of(tokens=1)
    plan, rows = plan_and_coefficients(recipe)
    prompts = encoded(policy)
    seen = []
    hook = policy.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=1, iteration=0, share=False)
    forwards = list(seen)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    stats = Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    hook.remove()
    assert set(seen) == {1}, "the published loop runs batches of one"
    assert sum(forwards) == plan.counts.unshared_rollout_forwards * len(TEXTS)
    assert stats.train_passes == plan.counts.unshared_train_passes * len(TEXTS)


@pytest.mark.parametrize("case", ["flat", "tree"])
def test_exact_replay_has_no_drift_at_all(case):
    recipe = small_recipe(**CASES[case], engine={"device": "cpu", "exact_replay": True})
    policy = policy_of(dtype="fp32", tokens=200)
    prompts = encoded(policy)
    plan, rows = plan_and_coefficients(recipe)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=3, iteration=0)
    credit = assign_credit(plan, recipe.credit, np.random.default_rng(0).random((len(TEXTS), plan.leaves, 1)), [1.0])
    stats = Recorder(recipe, policy).run([Rolled(policy, forest, prompts, credit, rows)])
    assert sum(map(len, stats.drift)) > 0
    assert float(torch.cat(stats.drift).abs().max()) == 0.0
