"""Signal and noise of the gradient: against one edge at a time and exact inner products, on constructed gradients whose
signal and noise are known, and beside a run that does not measure.
"""

import json
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch

from engine_cases import checkpoints, metrics_of, refuse, succeed, timeless, tiny_recipe, weights_of
from flowgrove.credit import assign_credit
from flowgrove.models.runner import PassRunner
from flowgrove.rollout.loop import rollout
from flowgrove.rollout.retained_graphs import RetainedGraphs
from flowgrove.update.gradient_noise import (
    MOST_GROUPS,
    Groups,
    gradient_noise,
    group_gradients,
    half_of_leaves,
    summary,
)
from flowgrove.update.noise_estimates import estimate, halves, product, student
from flowgrove.update.passes import Rolled
from flowgrove.update.sketch import Sketch
from flowgrove.update.updater import Updater
from host_reads import count_host_reads
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, policy_of, small_recipe
from torchrun import train
from update_cases import TREE, policy_with_reference

KEYS = (
    "gradient_snr", "gradient_snr_error", "gradient_signal", "gradient_signal_error", "gradient_noise",
    "gradient_noise_scale", "gradient_part", "gradient_cosine", "gradient_leaf_share", "gradient_passes",
)  # fmt: skip
WINDOW = {"steps": 5, "group_size": 6, "window": {"strategy": "frozen", "size": 2, "start": 1}}
# leaf → half: contiguous, whole subtrees of the first split
CASES = {
    "flat": ({"rollout": WINDOW}, [0, 0, 0, 1, 1, 1]),
    "tree": ({"rollout": TREE}, [0, 0, 1, 1]),
    "tree of three": (
        {"rollout": {**TREE, "group_size": 9, "tree": {"splits": [0, 2], "fanout": 3}}},
        [0] * 3 + [1] * 6,
    ),
    "unshared noise": ({"rollout": {**WINDOW, "shared_initial_noise": False}}, [0, 0, 0, 1, 1, 1]),
    "pruned": ({"rollout": TREE, "credit": {"prune": {"kind": "extreme", "keep": 1}}}, [0, 0, 1, 1]),
    "tempflow": ({"rollout": TREE, "update": {"step_weight": "tempflow"}}, [0, 0, 1, 1]),
    "small passes": ({"rollout": WINDOW}, [0, 0, 0, 1, 1, 1]),
}


def rolled_out(recipe, policy, runner, retained=None):
    """Three prompts of random scores, the first of them in a part of its own, as of another picture size."""
    plan, rows = plan_and_coefficients(recipe)
    scores = np.random.default_rng(3).random((len(TEXTS), plan.leaves, 1))
    credit = assign_credit(plan, recipe.credit, scores, [1.0])
    parts = []
    for texts, some in ((TEXTS[:1], slice(0, 1)), (TEXTS[1:], slice(1, 3))):
        prompts = encoded(policy, texts)
        forest = rollout(
            plan, rows, policy, prompts, runner, seed=5, iteration=0, first_prompt=some.start, retained=retained
        )
        own = {index: type(edges)(edges.advantage[some], edges.trains[some]) for index, edges in credit.items()}
        parts.append(Rolled(policy, forest, prompts, own, rows, some.start))
    return plan, parts, credit


def flat_gradient(updater):
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in updater.parameters])


def one_edge(policy, part, step, prompt, child, weight):
    """−A·∇logp of an edge, by plain autograd from MATH §1."""
    forest, rows = part.forest, part.coefficients
    x = forest.states[forest.first_row[step.index] + prompt * step.nodes_in + child // step.fanout][None]
    after = forest.states[forest.first_row[step.index + 1] + prompt * step.nodes_out + child][None]
    a, b, kappa = (t[step.index].double() for t in (rows.x_coef, rows.v_coef, rows.precision))
    sigma = torch.tensor([step.sigma], dtype=torch.float32)
    v = policy.velocity(x, sigma, part.prompts, torch.tensor([prompt])).v
    logp = -kappa * ((after - (a * x + b * v)) ** 2).mean()
    (-part.credit[step.index].advantage[prompt, child] * weight * logp).backward()


class Slow:
    """What one edge at a time gives: `gradient[step, prompt, half]`, and the rows that a packed pass would run."""

    def __init__(self, updater, plan, parts, sides, weight):
        self.gradient, self.rows, self.plan = {}, 0, plan
        for step in plan.trained_steps:
            halves = [
                sides[child * plan.leaves // step.nodes_out] * (step.nodes_out >= 4) for child in range(step.nodes_out)
            ]
            for prompt in range(len(TEXTS)):
                for half in (0, 1):
                    nodes = [child for child, side in enumerate(halves) if side == half]
                    part = parts[min(prompt, 1)]
                    self.gradient[step.index, prompt, half] = self.one(updater, part, step, prompt, nodes, weight(step))

    def one(self, updater, part, step, prompt, nodes, weight):
        credit, own = part.credit[step.index], prompt - part.first_prompt
        updater.optimizer.zero_grad(set_to_none=True)
        nodes = [child for child in nodes if credit.trains[own, child] and credit.advantage[own, child]]
        for child in nodes:
            one_edge(updater.policy, part, step, own, child, weight)
        self.rows += len({child // step.fanout for child in nodes})
        found = flat_gradient(updater)
        updater.optimizer.zero_grad(set_to_none=True)
        return found

    def of(self, steps, halves=(0, 1)):
        """The gradient of every prompt."""
        return [sum(self.gradient[step, n, half] for step in steps for half in halves) for n in range(len(TEXTS))]


def mean_product(pairs):
    return float(np.mean([float(one @ other) for one, other in pairs]))


def signal_and_noise(gradients):
    signal = mean_product(permutations(gradients, 2))
    return signal, mean_product(zip(gradients, gradients, strict=True)) - signal


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """What is told, by exact inner products, and the slow one; which steps have halves, and the first half's share."""
    changes, sides = CASES[request.param]
    recipe, policy = small_recipe(**changes), policy_of()
    runner = PassRunner.of(recipe, policy)
    if request.param == "small passes":
        runner.budget.resize(40)
    updater = Updater(recipe, policy, runner)
    plan, parts, credit = rolled_out(recipe, policy, runner)
    groups = Groups.among(np.ones(len(TEXTS), dtype=bool))
    scale = len(TEXTS) / sum(int(edges.trains.sum()) for edges in credit.values())
    size = sum(p.numel() for p in updater.parameters)
    found, passes = group_gradients(updater, plan, parts, groups, scale, size, lambda: flat_gradient(updater))
    stds = {step.index: float(parts[0].coefficients.std[step.index]) for step in plan.trained_steps}
    mean = np.mean(list(stds.values()))
    weight = (lambda step: scale * stds[step.index] / mean) if request.param == "tempflow" else lambda step: scale
    slow = Slow(updater, plan, parts, sides, weight)
    told = summary(plan, found.numpy(), groups.prompts) | {"gradient_passes": passes}
    return told, slow, [step.index for step in plan.trained_steps if step.nodes_out >= 4], sides.count(0) / len(sides)


def test_signal_and_noise_are_those_of_one_edge_at_a_time_and_exact_inner_products(both):
    told, slow, _, _ = both
    steps = [step.index for step in slow.plan.trained_steps]
    assert max(float(one.norm()) for one in slow.of(steps)) > 1e-6, "gradients of 0 prove nothing"
    for key, some in {"all": steps, **{str(step): [step] for step in steps}}.items():
        signal, noise = signal_and_noise(slow.of(some))
        assert told["gradient_signal"][key] == pytest.approx(signal, rel=1e-7, abs=1e-9 * abs(noise))
        assert told["gradient_noise"][key] == pytest.approx(noise, rel=1e-7, abs=1e-9 * abs(noise))
        if signal > 0 and noise > 0:
            assert told["gradient_snr"][key] == pytest.approx(len(TEXTS) * signal / noise, rel=1e-5)
            assert told["gradient_noise_scale"][key] == pytest.approx(noise / signal, rel=1e-5)
        else:
            assert told["gradient_snr"][key] is told["gradient_noise_scale"][key] is None
    assert told["gradient_passes"] == slow.rows


def test_what_steps_give_to_the_whole_is_too(both):
    told, slow, _, _ = both
    whole = slow.of([step.index for step in slow.plan.trained_steps])
    for step in slow.plan.trained_steps:
        own = slow.of([step.index])
        mixed = mean_product((own[m], whole[n]) for m, n in permutations(range(len(TEXTS)), 2))
        assert told["gradient_part"][str(step.index)] == pytest.approx(mixed, rel=1e-6, abs=1e-12)
    assert sum(told["gradient_part"].values()) == pytest.approx(told["gradient_signal"]["all"], rel=1e-9)


def test_what_halves_of_the_leaves_have_in_common_is_too(both):
    told, slow, halved, share = both
    assert list(told["gradient_cosine"]) == list(told["gradient_leaf_share"]) == ["all", *map(str, halved)]
    for key in told["gradient_cosine"]:
        steps = halved if key == "all" else [int(key)]
        first, second = slow.of(steps, (0,)), slow.of(steps, (1,))
        between = mean_product(zip(first, second, strict=True))
        norms = [mean_product(zip(each, each, strict=True)) for each in (first, second)]
        assert told["gradient_cosine"][key] == pytest.approx(between / np.sqrt(np.prod(norms)), rel=1e-6, abs=1e-9)
        signal, noise = signal_and_noise(slow.of(steps))
        luck = signal + noise - between / (share * (1 - share))
        assert told["gradient_leaf_share"][key] == pytest.approx(luck / noise, rel=1e-6, abs=1e-9)


def drawn(generator, prompts, mean, between, leaves, dims, share=0.5):
    """Halves of the gradients of `prompts`: expectation `mean`, a prompt's own part, and the luck of its leaves."""
    own = mean + between * generator.standard_normal((prompts, dims)) / dims**0.5
    first, second = (
        part * (own + leaves / part**0.5 * generator.standard_normal((prompts, dims)) / dims**0.5)
        for part in (share, 1 - share)
    )
    return first, second


@pytest.mark.parametrize(("prompts", "share"), [([1] * 6, 0.5), ([3, 2, 2], 0.5), ([2, 1, 1], 0.25)])
def test_estimates_are_right_in_the_mean_where_signal_and_noise_are_known(prompts, share):
    """‖g‖² = 4, prompts differ by 2² and leaves by 3²: noise 13, of which 9/13 are the leaves'."""
    generator, dims, draws = np.random.default_rng(0), 50, 4000
    mean, counts = np.full(dims, 2 / dims**0.5), np.array(prompts, dtype=float)
    group = np.repeat(np.arange(len(prompts)), prompts)
    found, top, bottom, luck = [], 0.0, 0.0, 0.0
    for _ in range(draws):
        first, second = (
            np.array([part[group == m].sum(0) for m in range(len(prompts))])
            for part in drawn(generator, len(group), mean, 2.0, 3.0, dims, share)
        )
        one, other = estimate(first + second, counts), halves(first, second, counts, share)
        found.append(one)
        top, bottom, luck = top + other.leaf_share * one.noise, bottom + one.noise, luck + other.cosine
    signal, _, noise, _ = np.array(found).T
    assert np.mean(signal) == pytest.approx(4, abs=5 * np.std(signal) / draws**0.5)
    assert np.mean(noise) == pytest.approx(13, abs=5 * np.std(noise) / draws**0.5)
    assert top / bottom == pytest.approx(9 / 13, abs=0.02)
    # E⟨h1, h2⟩ = f(1−f)·(4 + 4), E‖h1‖² = f²·(8 + 9/f)
    norms = share**2 * (8 + 9 / share) * (1 - share) ** 2 * (8 + 9 / (1 - share))
    assert luck / draws == pytest.approx(share * (1 - share) * 8 / norms**0.5, abs=0.03)
    assert product(first, second, counts) == pytest.approx(product(second, first, counts))


def test_the_error_is_that_of_the_signal_where_there_is_none():
    generator, counts = np.random.default_rng(1), np.array([2.0, 2, 1, 1])
    sums = [np.sqrt(counts)[:, None] * generator.standard_normal((4, 30)) for _ in range(3000)]
    found = np.array([estimate(each, counts) for each in sums])
    assert np.std(found[:, 0]) == pytest.approx(np.sqrt(np.mean(found[:, 1] ** 2)), rel=0.05)


def along_the_signal(generator, groups, each, signal):
    """Sums over `groups` of `each` prompts, whose noise of 2 lies half along the signal."""
    prompts = generator.standard_normal((groups, each, 30)) / 30**0.5
    prompts[..., 0] += signal + generator.standard_normal((groups, each))
    return prompts.sum(1)


@pytest.mark.parametrize(("groups", "each", "signal"), [(8, 1, 1.0), (8, 2, 1.0), (4, 1, 1.0), (8, 2, 0.3)])
def test_intervals_hold_the_ratio_where_there_is_a_signal(groups, each, signal):
    generator, counts, draws = np.random.default_rng(2), np.full(groups, float(each)), 1500
    found = [estimate(along_the_signal(generator, groups, each, signal), counts) for _ in range(draws)]
    prompts = groups * each
    off = [prompts * one.signal / one.noise - prompts * signal**2 / 2 for one in found]
    inside = [abs(value) <= student(groups - 1) * one.snr_error for value, one in zip(off, found, strict=True)]
    assert 0.89 < np.mean(inside) < 0.985


def test_the_jackknife_is_that_of_estimates_without_each_group():
    generator, counts = np.random.default_rng(3), np.array([3.0, 2, 2, 1])
    sums = generator.standard_normal((4, 9)) + 1
    left = [estimate(np.delete(sums, out, 0), np.delete(counts, out)) for out in range(4)]
    ratios = [counts.sum() * one.signal / one.noise for one in left]
    assert estimate(sums, counts).snr_error == pytest.approx((3 * np.var(ratios)) ** 0.5)
    assert np.isnan(estimate(sums[:2], counts[:2]).snr_error)


def test_a_95_percent_interval_of_student():
    """Against his distribution, drawn: a normal number over the spread of others."""
    draws = np.random.default_rng(4)
    for freedom in (1, 2, 5, 10, 11, 30):
        spread = np.sqrt(np.square(draws.standard_normal((100_000, freedom))).mean(1))
        inside = np.abs(draws.standard_normal(100_000)) < student(freedom) * spread
        assert np.mean(inside) == pytest.approx(0.95, abs=0.003)


def test_without_a_signal_there_is_no_ratio_and_the_numbers_stay():
    plan = plan_and_coefficients(small_recipe(rollout=WINDOW))[0]
    found = np.zeros((2, 2, 2, 3))
    found[:, 0, :, 0], found[:, 1, :, 0] = 1, -1
    told = json.loads(json.dumps(summary(plan, found, np.array([1, 1])), allow_nan=False))
    assert told["gradient_snr"] == told["gradient_noise_scale"] == {"all": None, "1": None, "2": None}
    assert told["gradient_signal"] == {"all": -16.0, "1": -4.0, "2": -4.0}
    assert told["gradient_noise"] == {"all": 32.0, "1": 8.0, "2": 8.0}
    found[0, 0, 0, 1] = np.nan
    told = summary(plan, found, np.array([1, 1]))
    assert told["gradient_signal"] == {"all": None, "1": None, "2": -4.0}
    json.dumps(told, allow_nan=False)


def test_groups_take_turns_among_the_prompts_that_have_a_score():
    scored = np.array([True, False, True, True])
    assert Groups.among(scored).of.tolist() == [0, -1, 1, 2]
    many = Groups.among(np.arange(20) != 3)
    assert many.prompts.tolist() == [3, 3, 3, 2, 2, 2, 2, 2]
    assert many.of[:5].tolist() == [0, 1, 2, -1, 3]
    assert len(many.prompts) == MOST_GROUPS
    assert len(Groups.among(np.zeros(3, dtype=bool)).prompts) == 0


def test_no_half_where_nothing_splits():
    alone = small_recipe(rollout={"group_size": 1}, update={"kl_weight": 0.1, "updates_per_iteration": 1})
    assert half_of_leaves(plan_and_coefficients(alone)[0]) == 0


def low_rank(generator, shapes):
    """Gradients as layers have them, with a row and a column that stand out."""
    found = {}
    for name, shape in shapes.items():
        one = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2:
            one = (
                torch.randn(shape[0], 3, generator=generator).double()
                @ torch.randn(3, shape[1], generator=generator).double()
            )
            one[:, 1] *= 10
            one[2] *= 10
        found[name] = one
    return found


SHAPES = {"a": (40, 64), "b": (33,), "c": (1,), "d": (101,), "e": (40, 64), "f": (101 * 128 + 5,)}


def test_sketches_keep_inner_products():
    """101 buckets: of 300 pairs, in the mean exact and by √2/√101 of the norms' product at most apart."""
    generator, errors = torch.Generator().manual_seed(0), []
    for number in range(300):
        one, other = low_rank(generator, SHAPES), low_rank(generator, SHAPES)
        other = {name: value + 0.3 * one[name] for name, value in other.items()}
        sketch = Sketch(str(number), CPU, torch.float64, buckets=101)
        exact, norms = (sum(float((a[name] * b[name]).sum()) for name in SHAPES) for a, b in ((one, other), (one, one)))
        norms = (norms * sum(float(value.square().sum()) for value in other.values())) ** 0.5
        errors.append((float(sketch(one.items()) @ sketch(other.items())) - exact) / norms)
    spread = np.std(errors)
    assert 0.3 * 101**-0.5 < spread < 1.3 * (2 / 101) ** 0.5
    assert abs(np.mean(errors)) < 4 * spread / 300**0.5


def test_sketches_are_linear_and_hang_on_names_and_seed_alone():
    generator = torch.Generator().manual_seed(0)
    one, other = low_rank(generator, SHAPES), low_rank(generator, SHAPES)
    sketch, again = (Sketch("s", CPU, torch.float64, buckets=101) for _ in range(2))
    both = sketch((name, one[name] + other[name]) for name in SHAPES)
    apart = again([(name, other[name]) for name in reversed(SHAPES)]) + again(one.items())
    assert torch.allclose(both, apart, rtol=1e-12, atol=1e-9)
    assert sum(bool((sketch([(name, one[name])]) != 0).any()) for name in SHAPES) == len(SHAPES)
    assert not torch.allclose(both, Sketch("t", CPU, torch.float64, buckets=101)(one.items()))
    assert torch.equal(sketch([]), torch.zeros(101, dtype=torch.float64))


def test_a_rank_without_rows_of_a_weight_adds_nothing():
    sketch = Sketch("s", CPU, torch.float64, buckets=101)
    rows = ("a/0", torch.ones(3, 4, dtype=torch.float64))
    none = ("b/16", torch.empty(0, 4, dtype=torch.float64))
    assert torch.equal(sketch([none, rows]), sketch([rows]))
    assert torch.equal(sketch([none]), torch.zeros(101, dtype=torch.float64))


def sketched(sketch, policy):
    return sketch(policy.weights.own_gradients())


def measured(recipe, policy, runner=None, **more):
    runner = runner or PassRunner.of(recipe, policy)
    updater = Updater(recipe, policy, runner)
    plan, parts, credit = rolled_out(recipe, policy, runner, **more)
    return updater, plan, parts, lambda: gradient_noise(updater, plan, parts, credit, np.ones(len(TEXTS), dtype=bool))


def test_the_measurement_is_near_the_exact_one_and_leaves_graphs_and_gradients_alone():
    recipe, policy = small_recipe(rollout=WINDOW), policy_of(dtype="fp32")
    updater, plan, parts, measure = measured(recipe, policy, retained=RetainedGraphs(100))
    assert parts[0].forest.retained
    told = measure()
    assert tuple(told) == KEYS
    assert all(each.velocity is not None for part in parts for each in part.forest.retained)
    assert all(p.grad is None for p in updater.parameters)
    groups, size = Groups.among(np.ones(len(TEXTS), dtype=bool)), sum(p.numel() for p in updater.parameters)
    scale = len(TEXTS) / sum(int(edges.trains.sum()) for part in parts for edges in part.credit.values())
    found, passes = group_gradients(updater, plan, parts, groups, scale, size, lambda: flat_gradient(updater))
    exact = summary(plan, found.double().numpy(), groups.prompts)
    for key, noise in exact["gradient_noise"].items():
        assert told["gradient_noise"][key] == pytest.approx(noise, rel=0.05)
        assert told["gradient_signal"][key] == pytest.approx(exact["gradient_signal"][key], abs=0.02 * noise)
    assert told["gradient_passes"] == passes


def test_what_ranks_find_of_their_prompts_adds_up():
    recipe, policy = small_recipe(rollout=WINDOW), policy_of()
    updater, plan, parts, _ = measured(recipe, policy)
    groups = Groups(np.array([0, 1, 0]), np.array([2, 1]))  # a group that two ranks have a part of

    def found(some):
        sketch = Sketch("s", CPU, torch.float64)  # each rank has its own
        take = partial(sketched, sketch, policy)
        return group_gradients(updater, plan, some, groups, 1.0, sketch.buckets, take)

    whole, apart = found(parts), [found(parts[:1]), found(parts[1:]), found([])]
    assert whole[1] == sum(passes for _, passes in apart)
    assert float(whole[0].abs().max()) > 0
    assert torch.allclose(whole[0], sum(sums for sums, _ in apart), rtol=1e-8, atol=1e-12)


def test_the_divergence_from_the_reference_is_in_the_gradient():
    changes = {"rollout": WINDOW, "update": {"kl_weight": 0.5, "updates_per_iteration": 1}}
    recipe = small_recipe(**changes)
    moved = policy_with_reference(recipe, 1.0)
    *_, measure = measured(recipe, moved)
    without = small_recipe(**changes | {"update": {"updates_per_iteration": 1}})
    *_, measure_without = measured(without, moved)
    assert measure()["gradient_signal"]["all"] != pytest.approx(measure_without()["gradient_signal"]["all"], rel=1e-3)


def test_the_host_reads_nothing_while_passes_run():
    recipe, policy = small_recipe(rollout=TREE), policy_of(dtype="fp32")
    updater, plan, parts, _ = measured(recipe, policy)
    sketch = Sketch("s", CPU, torch.float32)
    groups = Groups.among(np.ones(len(TEXTS), dtype=bool))
    work = (updater, plan, parts, groups, 1.0, sketch.buckets, partial(sketched, sketch, policy))
    assert count_host_reads(lambda: group_gradients(*work)) == 0


def fail_passes(monkeypatch, updater, fails):
    """Memory is full in the passes whose numbers, or sizes in rows, `fails` names."""
    original, calls = updater._backward, iter(range(1000))

    def failing(part, batch, *rest):
        if fails(next(calls), len(batch)):
            raise torch.OutOfMemoryError
        return original(part, batch, *rest)

    monkeypatch.setattr(updater, "_backward", failing)


def test_full_memory_halves_passes_of_the_measurement_alone_and_keeps_graphs(monkeypatch, caplog):
    recipe, policy = small_recipe(rollout=WINDOW), policy_of()
    expected = measured(recipe, policy)[-1]()
    updater, _, parts, measure = measured(recipe, policy, retained=RetainedGraphs(100))
    budget = updater.runner.budget
    before, largest = budget.tokens, budget._largest
    fail_passes(monkeypatch, updater, lambda call, rows: rows > 1)
    told = measure()
    assert all(part.forest.retained for part in parts)
    assert (budget.tokens, budget._largest) == (before, largest)
    assert "in this measurement" in caplog.text
    assert told["gradient_signal"]["all"] == pytest.approx(expected["gradient_signal"]["all"], rel=1e-6)
    assert budget.halve(), "what an update gives up after it"
    assert budget.tokens == largest // 2


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "on another rank"])
def test_a_measurement_that_does_not_fit_is_left_out_on_all_ranks(elsewhere, monkeypatch, caplog):
    recipe, policy = small_recipe(rollout=WINDOW), policy_of()
    updater, _, parts, measure = measured(recipe, policy, retained=RetainedGraphs(100))
    if elsewhere:
        monkeypatch.setattr(updater.ranks, "most", lambda number: 1)
    else:
        fail_passes(monkeypatch, updater, lambda call, rows: call % 4 == 3)
    before = updater.runner.budget.tokens
    assert measure() == {}
    assert "no room to measure the gradient's noise in iteration 0, and the run goes on" in caplog.text
    assert all(part.forest.retained for part in parts)
    assert updater.runner.budget.tokens == before
    assert all(p.grad is None for p in updater.parameters)


def test_other_errors_of_a_measurement_are_raised(monkeypatch):
    recipe, policy = small_recipe(rollout=WINDOW), policy_of()
    updater, *_, measure = measured(recipe, policy)

    def broken(*arguments):
        raise RuntimeError("not of memory")

    monkeypatch.setattr(updater, "_backward", broken)
    with pytest.raises(RuntimeError, match="not of memory"):
        measure()


def test_fewer_than_two_scored_prompts_measure_nothing():
    recipe, policy = small_recipe(rollout=WINDOW), policy_of()
    updater = Updater(recipe, policy, PassRunner.of(recipe, policy))
    plan, parts, credit = rolled_out(recipe, policy, updater.runner)
    assert gradient_noise(updater, plan, parts, credit, np.array([False, True, False])) == {}
    for edges in credit.values():
        edges.trains[:] = False
    assert gradient_noise(updater, plan, parts, credit, np.ones(3, dtype=bool)) == {}


# whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One without, one that measures every second iteration, one that begins to when it goes on."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny_recipe(folder, run={"eval_every": 0})
    on = ("--set", "run.gradient_noise_every=2")
    succeed("train", recipe, "--out", folder / "off")
    succeed("train", recipe, "--out", folder / "on", *on)
    succeed("train", recipe, "--out", folder / "later", "--set", "run.iterations=1")
    succeed("train", recipe, "--out", folder / "later", *on)
    return folder


@pytest.mark.parametrize("name", ["on", "later"])
def test_a_run_that_measures_trains_what_another_does_to_the_last_bit(runs, name):
    assert checkpoints(runs / name) == checkpoints(runs / "off")
    found, wanted = weights_of(runs / name, 3), weights_of(runs / "off", 3)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    lines = [{key: value for key, value in line.items() if key not in KEYS} for line in metrics_of(runs / name)]
    assert timeless(lines) == timeless(metrics_of(runs / "off"))


def test_only_the_lines_that_are_named_tell_of_it(runs):
    lines = metrics_of(runs / "on")
    assert [[key for key in line if key.startswith("gradient_")] for line in lines] == [list(KEYS), [], list(KEYS)]
    assert ["gradient_noise" in line["seconds"] for line in lines] == [True, False, True]
    assert metrics_of(runs / "later")[2]["gradient_noise"] == lines[2]["gradient_noise"]
    assert list(lines[2]["gradient_part"]) == list(lines[2]["advantage_by_step"])
    assert not any(key.startswith("gradient_") for line in metrics_of(runs / "off") for key in line)


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "engine"),
    [
        (2, {"distributed": "ddp"}),
        (2, {"distributed": "fsdp2"}),
        (3, {"distributed": "fsdp2", "reshard_after_forward": False}),
        (4, {"distributed": "fsdp2", "shard_degree": 2}),
        (5, {"distributed": "fsdp2"}),
    ],
    ids=["ddp", "fsdp2", "fsdp2, a rank without prompts", "copies of a division", "a rank without rows of a weight"],
)
def test_several_ranks_measure_what_one_does(ranks, engine, tmp_path):
    """Sketches of divided weights are others, whose error is that of a sketch; what is trained is the same."""
    model = {"adapter": "sd3", "path": "tiny", "dtype": "fp64", "gradient_checkpointing": False}
    run = {"iterations": 1, "eval_every": 0, "gradient_noise_every": 1}
    recipe = tiny_recipe(tmp_path, model=model, data={"prompts_per_iteration": 2 if ranks == 3 else 5}, run=run)
    succeed("train", recipe, "--out", tmp_path / "one")
    train(ranks, recipe, "--out", tmp_path / "several", output=tmp_path / "log", **engine)
    (one,), (several,) = (metrics_of(tmp_path / name) for name in ("one", "several"))
    share = 1e-6 if engine["distributed"] == "ddp" else 0.03
    for key in KEYS[2:5] + KEYS[6:7]:
        assert list(several[key]) == list(one[key])
        for name, value in one[key].items():
            near = share * one["gradient_noise"].get(name, one["gradient_noise"]["all"])
            assert several[key][name] == pytest.approx(value, rel=1e-6, abs=near), (key, name)
    assert several["gradient_passes"] == one["gradient_passes"]
    assert several["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)


def test_one_prompt_cannot_be_measured(tmp_path):
    recipe = tiny_recipe(tmp_path, run={"gradient_noise_every": 1}, data={"prompts_per_iteration": 1})
    assert "write 2 or more, or null" in refuse("plan", recipe)
