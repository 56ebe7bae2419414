"""The forest that a run keeps: its numbers against rewards, plan and an own rollout, its clean estimates against passes
of the model, and that nothing trains otherwise for it.
"""

import base64
import io
import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from engine_cases import flowgrove, metrics_of, succeed, timeless, tiny_recipe, weights_of
from flowgrove.iteration import Stages
from flowgrove.models.geometry import Geometry
from flowgrove.models.policy import Policy
from flowgrove.models.runner import PassRunner
from flowgrove.report.forest_capture import capture_forest, clean_estimates, most_decoded
from flowgrove.report.forests import (
    ForestNumbers,
    PromptForest,
    forest_content,
    forest_files,
    load_forest,
    remove_forest,
    save_forest,
)
from flowgrove.rewards.registry import Rewards
from flowgrove.rewards.scoring import score_leaves
from flowgrove.rollout.loop import rollout
from flowgrove.run.stopping import Stopped
from flowgrove.setup import Setup
from policy_cases import CPU, TEXTS, encoded, plan_and_coefficients, policy_of, runner_of, small_recipe
from tiny_families import MODELS, write_pipeline
from update_cases import Recorder

TREE = {
    "steps": 7, "group_size": 8, "tree": {"splits": [0, 2, 4], "fanout": 2},
    "window": {"strategy": "frozen", "size": 2, "start": 0}, "tail": {"compress": 0.5},
}  # fmt: skip
BRANCH = {"steps": 6, "group_size": 4, "tree": {"splits": [1, 3], "fanout": 2}, "window": {"strategy": "all"}}
DEPTH = {"kind": "depth", "depths": 2, "first": 1, "stop": 3, "every": 1}
CASES = {
    "window with shared noise": {},
    "window without shared noise": {"rollout": {"shared_initial_noise": False}},
    "tree": {"rollout": TREE},
    "tree of several roots": {"rollout": {**TREE, "group_size": 16, "shared_initial_noise": False}},
    "every leaf for itself": {"rollout": TREE, "engine": {"device": "cpu", "share": False}},
    "depths pruned": {"rollout": BRANCH, "credit": {"prune": DEPTH}},
    "width pruned": {"rollout": TREE, "credit": {"prune": {"kind": "parent_top1"}}},
    "extremes kept": {"rollout": TREE, "credit": {"prune": {"kind": "extreme", "keep": 1}}},
    "some steps of each": {"rollout": BRANCH, "update": {"step_fraction": 0.5, "partition": "parents"}},
    "steps and leaves": {
        "rollout": BRANCH, "update": {"step_fraction": 0.5}, "credit": {"prune": {"kind": "extreme", "keep": 1}},
    },
    "tempflow": {"rollout": TREE, "update": {"step_weight": "tempflow"}},
    "two sizes": {"model": {"sizes": [[32, 32], [16, 32]]}},
}  # fmt: skip


class Seen:
    """An iteration of a case: what `capture_forest` was given and what it made of it."""

    def __init__(self, case, **sections):
        self.recipe = small_recipe(**CASES[case], **sections)
        self.policy = Policy.load(self.recipe, CPU, TEXTS)
        self.recorder = Recorder(self.recipe, self.policy)
        self.runner = self.recorder.runner
        stages = Stages(Setup(self.recipe), self.policy, self.recorder, Rewards(self.recipe, CPU))
        self.line = stages.run(TEXTS, 2, self.look)

    def look(self, parts, scores, whole):
        self.parts, self.scores = parts, scores
        self.forest = capture_forest(self.recipe, self.runner, parts, scores, whole)
        self.numbers = self.forest.numbers


@pytest.fixture(params=CASES)
def seen(request):
    return seen_of(request.param)


@cache
def seen_of(case):
    return Seen(case)


def below(numbers, level, node):
    """The leaves below a node, found by asking every leaf for its ancestors."""
    leaves = numbers.steps[-1].nodes_out
    count = leaves if level == len(numbers.steps) else numbers.steps[level].nodes_in
    return [leaf for leaf in range(leaves) if ancestors(numbers, leaf)[level] == node], count


@cache
def _ancestors(fanouts, leaf):
    nodes = [leaf]
    for fanout in reversed(fanouts):
        nodes.append(nodes[-1] // fanout)
    return nodes[::-1]


def ancestors(numbers, leaf):
    """The node of every level on the way to a leaf."""
    return _ancestors(tuple(step.fanout for step in numbers.steps), leaf)


def test_levels_and_parents_are_those_of_every_leafs_way(seen):
    numbers, plan = seen.numbers, seen.parts[0].forest.plan
    assert (numbers.iteration, numbers.prompt, numbers.prompt_number) == (2, TEXTS[0], 0)
    assert [(step.sigma, step.sigma_next, step.solver) for step in numbers.steps] == [
        (step.sigma, step.sigma_next, step.solver) for step in plan.steps
    ]
    assert [index for index, step in enumerate(numbers.steps) if step.window] == list(plan.window)
    assert set(numbers.edges) == {step.index for step in plan.steps if step.stochastic}
    for leaf in range(plan.leaves):
        way = ancestors(numbers, leaf)
        for index, (parent, child) in enumerate(pairwise(way)):
            if index in numbers.edges:
                assert numbers.edges[index].parent[child] == parent


def test_rewards_are_those_of_the_prompts_leaves(seen):
    part = seen.parts[0]
    leaves = part.forest.plan.leaves
    texts = [TEXTS[0]] * leaves
    again = score_leaves(part.policy, seen.runner, Rewards(seen.recipe, CPU), part.forest.leaves[:leaves], texts)
    assert seen.numbers.scores == again.tolist()
    assert seen.numbers.totals == [pytest.approx(float(row.sum())) for row in again]  # one reward of weight 1


def test_advantages_are_those_of_the_rewards_below(seen):
    numbers = seen.numbers
    for index, edges in numbers.edges.items():
        means = []
        for child in range(numbers.steps[index].nodes_out):
            leaves, _ = below(numbers, index + 1, child)
            means.append(sum(numbers.totals[leaf] for leaf in leaves) / len(leaves))
        if not numbers.steps[index].trained:
            assert edges.advantage == [None] * len(means)
        elif max(means) - min(means) <= 1e-6:
            assert edges.advantage == [0.0] * len(means)
        else:
            spread = float(np.std(means, ddof=1)) + 1e-8
            expected = [(mean - sum(means) / len(means)) / spread for mean in means]
            assert edges.advantage == [pytest.approx(value, abs=1e-9) for value in expected]


def test_log_probabilities_are_those_of_an_own_rollout(seen):
    part = seen.parts[0]
    alone = rollout(
        part.forest.plan, part.coefficients, part.policy, part.policy.encode(TEXTS[:1]), seen.runner,
        seed=seen.recipe.run.seed, iteration=2,
    )  # fmt: skip
    for index, edges in seen.numbers.edges.items():
        if seen.numbers.steps[index].trained:
            first = alone.first_row[index + 1]
            expected = alone.logp[first : first + len(edges.logp)].tolist()
            assert edges.logp == [pytest.approx(value, rel=1e-9) for value in expected]


def test_what_does_not_train_is_told_with_its_reason(seen):
    """Every edge's way through plan and pruning, one by one."""
    recipe, numbers, plan = seen.recipe, seen.numbers, seen.parts[0].forest.plan
    order = sorted(range(plan.leaves), key=lambda leaf: numbers.totals[leaf])  # stable, as argsort is
    prune = recipe.credit.prune
    last = max(index for index, step in enumerate(numbers.steps) if step.fanout > 1) if prune else 0
    for index, edges in numbers.edges.items():
        for child, why in enumerate(edges.untrained):
            leaves, _ = below(numbers, index + 1, child)
            if prune is not None and prune.kind == "depth" and index in (1, 2, 3) and not numbers.steps[index].trained:
                assert why == "depth"
            elif index not in plan.selected_steps(0)[leaves[0]]:
                assert why == "step_fraction"
            elif prune is not None and prune.kind == "extreme" and not {order[0], order[-1]} & set(leaves):
                assert why == "extreme"
            elif prune is not None and prune.kind == "parent_top1" and not kept(numbers, last, leaves):
                assert why == "parent_top1"
            else:
                assert why is None
    reasons = {why for edges in numbers.edges.values() for why in edges.untrained}
    wanted = {None} | ({prune.kind} if prune else set())
    assert reasons == wanted | ({"step_fraction"} if recipe.update.step_fraction < 1 else set())


def kept(numbers, last, leaves):
    """Whether one of the leaves lies below the better child of its parent at the last split."""
    fanout = numbers.steps[last].fanout
    for leaf in leaves:
        mine = ancestors(numbers, leaf)[last + 1]
        first = mine - mine % fanout
        means = []
        for child in range(first, first + fanout):
            under, _ = below(numbers, last + 1, child)
            means.append(sum(numbers.totals[each] for each in under) / len(under))
        if means.index(max(means)) == mine - first:
            return True
    return False


def test_updates_and_weights_are_those_that_the_loss_takes(seen):
    """Over the edges of all prompts: what an update's weights sum to, and how many edges it has."""
    recipe, numbers, plan = seen.recipe, seen.numbers, seen.parts[0].forest.plan
    counts = [0] * plan.updates
    for part in seen.parts:
        for step in plan.trained_steps:
            for child in range(step.nodes_out):
                first = child - child % step.fanout if recipe.update.partition == "parents" else child
                update = below(numbers, step.index + 1, first)[0][0] * plan.updates // plan.leaves
                counts[update] += int(part.credit[step.index].trains[:, child].sum())
                assert numbers.edges[step.index].update[child] == update
    stds = {step.index: seen.parts[0].coefficients.std[step.index].item() for step in plan.trained_steps}
    for index, edges in numbers.edges.items():
        omega = 1.0
        if recipe.update.step_weight == "tempflow":
            omega = stds[index] * len(stds) / sum(stds.values())
        for why, update, weight in zip(edges.untrained, edges.update, edges.weight, strict=True):
            assert weight == (0.0 if why else pytest.approx(omega / counts[update]))


def test_pictures_are_of_all_leaves_and_of_where_trajectories_part(seen):
    plan, last = seen.parts[0].forest.plan, len(seen.numbers.steps)
    levels = {}
    for level, node in seen.forest.pictures:
        levels.setdefault(level, []).append(node)
    assert levels.pop(last) == list(range(plan.leaves))
    first = plan.trained_steps[0]
    parting = {step.index for step in plan.trained_steps if step.fanout > 1 or step is first}
    assert levels == {index: list(range(plan.steps[index].nodes_in)) for index in parting}
    decoded = seen.policy.decode(seen.parts[0].forest.leaves[:1])[0]
    expected = (decoded.movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(seen.forest.pictures[last, 0], expected)


SOLVERS = [
    ({"dynamics": "flow_sde"}, 0.0, 1.0), ({"dynamics": "dance_sde"}, 0.0588, 1.0), ({"dynamics": "cps"}, 0.0588, 1.0),
    ({"dynamics": "flow_sde"}, 0.0588, 4.0),
]  # fmt: skip


@pytest.mark.parametrize(("dynamics", "correlation", "scale"), SOLVERS)
@pytest.mark.parametrize(("dtype", "within"), [("fp64", 1e-10), ("fp32", 2e-5)])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@torch.no_grad()
def test_estimates_without_a_pass_are_those_of_one(dynamics, correlation, scale, dtype, within, guidance):
    tree = {**TREE["tree"], "sibling_correlation": correlation, "split_noise_scale": scale}
    recipe = small_recipe(rollout={**TREE, **dynamics, "tree": tree})
    plan, rows = plan_and_coefficients(recipe)
    policy = policy_of(dtype, guidance)
    prompts = encoded(policy)
    forest = rollout(plan, rows, policy, prompts, runner_of(policy), seed=9, iteration=0, first_prompt=4)

    class Part:  # what of a Rolled is asked for
        coefficients, first_prompt = rows, 4

    part = Part()
    part.forest = forest
    for step in plan.trained_steps:
        for prompt in (0, 2):
            found = clean_estimates(part, 9, step, prompt)
            first = forest.first_row[step.index] + prompt * step.nodes_in
            x = forest.states[first : first + step.nodes_in]
            sigma = torch.full((step.nodes_in,), step.sigma)
            velocity = policy.velocity(x, sigma, prompts, torch.full((step.nodes_in,), prompt))
            v = velocity.v.double()
            if velocity.uncond is not None:
                v = velocity.uncond.double() + guidance * (v - velocity.uncond.double())
            assert found.dtype == x.dtype
            assert float((found.double() - (x.double() - step.sigma * v)).abs().max()) < within


def test_a_prompt_that_was_not_scored_is_not_drawn():
    seen = seen_of("tree")
    scores = seen.scores.clone()
    scores[3] = torch.nan
    whole = type("Whole", (), {"plan": seen.parts[0].forest.plan, "sizes": _sizes(seen)})
    found = capture_forest(seen.recipe, seen.runner, seen.parts, scores, whole)
    assert (found.numbers.prompt, found.numbers.prompt_number) == (TEXTS[1], 1)
    scores[:] = torch.nan
    assert capture_forest(seen.recipe, seen.runner, seen.parts, scores, whole) is None
    assert capture_forest(seen.recipe, seen.runner, [], seen.scores, whole) is None  # a rank without a prompt


def _sizes(seen):
    return [type("Size", (), {"selected": 1})] * seen.recipe.update.updates_per_iteration


@pytest.mark.long
def test_a_large_group_has_some_pictures_a_huge_one_no_forest_and_large_pictures_are_small(monkeypatch):
    recipe = small_recipe(rollout={"group_size": 100, "shared_initial_noise": False})
    policy = policy_of("fp64")
    forests = []

    def look(parts, scores, whole):
        forests.append(capture_forest(recipe, runner, parts, scores, whole))

    runner = PassRunner.of(recipe, policy)
    decode = runner.decode
    monkeypatch.setattr(
        runner, "decode", lambda policy, x: decode(policy, x).repeat_interleave(10, -1).repeat_interleave(5, -2)
    )
    recorder = Recorder(recipe, policy)
    Stages(Setup(recipe), policy, recorder, Rewards(recipe, CPU)).run(TEXTS[:1], 0, look)
    monkeypatch.setattr("flowgrove.report.forest_capture.MOST_LEAVES", 99)
    Stages(Setup(recipe), policy, recorder, Rewards(recipe, CPU)).run(TEXTS[:1], 0, look)
    assert forests[1] is None
    nodes = list(forests[0].pictures)
    assert {level for level, _ in nodes} == {5}  # 100 clean estimates would be too many
    assert len(nodes) == 64
    assert (nodes[0], nodes[-1]) == ((5, 0), (5, 99))
    assert {picture.shape for picture in forests[0].pictures.values()} == {(64, 128, 3)}
    assert len(forests[0].numbers.totals) == 100


@pytest.mark.parametrize(
    ("height", "width", "frames", "most"),
    [
        (32, 32, None, (64, 64)),
        (512, 512, None, (64, 64)),
        (1024, 1024, None, (16, 16)),
        (8192, 8192, None, (1, 0)),
        (32, 32, 5, (4, 0)),
        (480, 832, 33, (2, 0)),
        (480, 832, 81, (1, 0)),
        (720, 1280, 81, (1, 0)),
    ],
)
def test_what_is_decoded_is_capped_by_its_pixels(height, width, frames, most):
    leaves, inner = most_decoded(Geometry((1,), height, width, 1, frames, 1, 1, 1))
    assert (leaves, inner) == most
    assert leaves == 1 or (leaves + inner) * height * width * (frames or 1) <= 1 << 25


def test_large_pictures_have_fewer_leaves_and_inner_nodes(monkeypatch):
    monkeypatch.setattr("flowgrove.report.forest_capture.PIXELS_AT_ONCE", 8 * 32 * 32)
    found = Seen("tree").forest.pictures
    assert list(found) == [(6, 0), (6, 2), (6, 5), (6, 7), (0, 0), (2, 0), (2, 1)]


def test_of_videos_a_few_leaves_are_decoded_and_no_inner_node(tmp_path, monkeypatch):
    counts, decode = [], PassRunner.decode

    def counted(self, policy, x):
        counts.append(len(x))
        return decode(self, policy, x)

    monkeypatch.setattr(PassRunner, "decode", counted)
    seen = Seen("tree", model={**MODELS["wan"], "dtype": "fp32", "path": str(write_pipeline("wan", tmp_path / "wan"))})
    assert list(seen.forest.pictures) == [(6, 0), (6, 2), (6, 5), (6, 7)]
    assert {picture.shape for picture in seen.forest.pictures.values()} == {(32, 32, 3)}
    assert (sum(counts[:-1]), counts[-1]) == (len(TEXTS) * 8, 4)


# The files


def at(forest, iteration):
    return PromptForest(forest.numbers.model_copy(update={"iteration": iteration}), forest.pictures)


def test_a_forest_is_read_as_it_was_written(seen, tmp_path):
    save_forest(tmp_path, seen.forest)
    (path,) = forest_files(tmp_path).values()
    assert path == tmp_path / "forests" / "iteration_000002.json"
    found = load_forest(path)
    assert found.numbers == seen.numbers
    assert found.pictures.keys() == seen.forest.pictures.keys()
    assert all(np.array_equal(picture, seen.forest.pictures[node]) for node, picture in found.pictures.items())
    with Image.open(path.with_suffix(".png")) as image:
        assert image.width == 8 * next(iter(found.pictures.values())).shape[1]


def test_a_folder_keeps_so_many_forests_and_a_page_shows_a_few_of_them_spread_over_the_run(tmp_path):
    forest = seen_of("window with shared noise").forest
    for iteration in range(0, 200, 2):
        save_forest(tmp_path, at(forest, iteration))
        assert len(forest_files(tmp_path)) <= 64
    found = list(forest_files(tmp_path))
    assert (found[0], found[-1]) == (0, 198)
    assert max(b - a for a, b in pairwise(found)) <= 8
    assert len(list((tmp_path / "forests").glob("*.png"))) == len(found)
    shown = [content["iteration"] for content in forest_content(tmp_path)]
    assert (shown[0], shown[-1], len(shown)) == (0, 198, 6)
    assert max(b - a for a, b in pairwise(shown)) < 60


def test_a_thousand_forests_leave_some_that_are_spread_over_the_whole_run(tmp_path):
    numbers = seen_of("window with shared noise").numbers
    for iteration in range(1000):
        save_forest(tmp_path, PromptForest(numbers.model_copy(update={"iteration": iteration}), {}))
    found = list(forest_files(tmp_path))
    gaps = [after - before for before, after in pairwise(found)]
    assert (found[0], found[-1], len(found)) == (0, 999, 64)
    assert max(gaps) <= 4 * 999 / 63


def test_a_forest_that_goes_while_a_page_is_made_is_passed_over(tmp_path, monkeypatch):
    forest = seen_of("tree").forest
    for iteration in range(3):
        save_forest(tmp_path, at(forest, iteration))
    files = forest_files(tmp_path)

    def load(path):
        remove_forest(files[1])
        return load_forest(path)

    monkeypatch.setattr("flowgrove.report.forests.load_forest", load)
    assert [content["iteration"] for content in forest_content(tmp_path)] == [0, 2]


def test_numbers_that_cannot_be_written_leave_no_pictures(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr("flowgrove.report.forests.write_text", denied)
    with pytest.raises(PermissionError):
        save_forest(tmp_path, seen_of("tree").forest)
    assert list((tmp_path / "forests").iterdir()) == []


def test_damaged_forests_are_passed_over_and_damaged_pictures_left_out(tmp_path):
    forest = seen_of("tree").forest
    for iteration in range(9):
        save_forest(tmp_path, at(forest, iteration))
    files = forest_files(tmp_path)
    whole = json.loads(files[0].read_text())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"\xff\xfe")
    short = {**whole, "totals": whole["totals"][:-1]}
    grown = {**whole, "steps": [{**whole["steps"][0], "nodes_out": 4096}, *whole["steps"][1:]]}
    other = {**whole, "edges": {**whole["edges"], "6": whole["edges"]["0"]}}
    for number, content in enumerate([short, grown, other, [], {**whole, "steps": []}], start=2):
        files[number].write_text(json.dumps(content))
    files[7].with_suffix(".png").write_bytes(b"no picture")
    found = forest_content(tmp_path)
    assert [content["iteration"] for content in found] == [7, 8]
    assert [content["pictures"] is not None for content in found] == [False, True]
    for number in range(7):
        with pytest.raises(ValueError, match=f"iteration_00000{number}.json is no forest"):
            load_forest(files[number])
    assert forest_content(tmp_path / "elsewhere") == []


def test_what_a_page_draws_is_json_with_rounded_numbers_and_pictures_inside(tmp_path):
    seen = seen_of("extremes kept")
    save_forest(tmp_path, seen.forest)
    (content,) = forest_content(tmp_path)
    again = json.loads(json.dumps(content, allow_nan=False))
    assert again["edges"]["2"]["advantage"] == [pytest.approx(a, rel=1e-4) for a in seen.numbers.edges[2].advantage]
    assert again["edges"]["2"]["untrained"] == seen.numbers.edges[2].untrained
    pictures = again["pictures"]
    assert pictures["src"].startswith("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(pictures["src"].partition(",")[2]))) as image:
        whole = np.asarray(image.convert("RGB"))
    assert whole.shape == (32 * pictures["rows"], 32 * pictures["columns"], 3)
    assert set(pictures["places"]) == {f"{level}/{node}" for level, node in seen.forest.pictures}
    for (level, node), picture in seen.forest.pictures.items():
        row, column = divmod(pictures["places"][f"{level}/{node}"], pictures["columns"])
        assert np.array_equal(whole[32 * row : 32 * row + 32, 32 * column : 32 * column + 32], picture)
    (served,) = forest_content(tmp_path, lambda iteration, picture, kind: f"{iteration}.{kind}")
    assert served["pictures"]["src"] == "2.png"


# In a run


def names(run):
    return [path.name for path in sorted((run / "forests").iterdir())] if (run / "forests").exists() else []


def both(*iterations):
    return [f"iteration_{iteration:06d}.{kind}" for iteration in iterations for kind in ("json", "png")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forests")
    rollout = {"steps": 6, "tree": {"splits": [0, 2], "fanout": 2}, "window": {"strategy": "none"}}
    recipe = tiny_recipe(folder, rollout=rollout, run={"iterations": 4})
    succeed("train", recipe, "--out", folder / "run")
    return recipe, folder / "run"


def test_forests_are_kept_with_evaluations_and_at_the_end(run):
    assert names(run[1]) == both(0, 2, 3)


@pytest.mark.parametrize(("every", "kept"), [(0, []), (1, both(0, 1, 2, 3))])
def test_weights_metrics_and_grids_have_the_same_bits_with_and_without_forests(run, every, kept, tmp_path):
    recipe, base = run
    succeed("train", recipe, "--out", tmp_path, "--set", f"run.forest_every={every}")
    assert names(tmp_path) == kept
    assert timeless(metrics_of(tmp_path)) == timeless(metrics_of(base))
    mine, others = weights_of(tmp_path, 4), weights_of(base, 4)
    assert all(torch.equal(mine[name], others[name]) for name in others)
    for grid in (base / "samples").iterdir():
        assert (tmp_path / "samples" / grid.name).read_bytes() == grid.read_bytes()


def test_the_forests_of_a_branch_that_was_left_go(run, tmp_path):
    recipe, base = run
    succeed("train", recipe, "--out", tmp_path, "--set", "run.iterations=2", "--set", "run.forest_every=1")
    left = ForestNumbers.model_validate_json((tmp_path / "forests" / "iteration_000001.json").read_text())
    save_forest(tmp_path, PromptForest(left.model_copy(update={"iteration": 3}), {}))
    save_forest(tmp_path, PromptForest(left.model_copy(update={"iteration": 17}), {}))
    succeed("train", recipe, "--out", tmp_path)
    assert names(tmp_path) == both(0, 1, 2, 3)
    for name in both(0, 2, 3):
        assert (tmp_path / "forests" / name).read_bytes() == (base / "forests" / name).read_bytes()


def test_nothing_is_captured_where_nobody_looks(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("flowgrove.trainer.capture_forest", lambda *_: asked.append(True))
    succeed("train", run[0], "--out", tmp_path / "none", "--set", "run.eval_every=0", "--set", "run.iterations=1")
    assert asked == []
    succeed("train", run[0], "--out", tmp_path / "some", "--set", "run.eval_every=1", "--set", "run.iterations=1")
    assert asked == [True]


def assert_trained_as(found, expected):
    assert timeless(metrics_of(found)) == timeless(metrics_of(expected))
    mine, others = weights_of(found, 4), weights_of(expected, 4)
    assert all(torch.equal(mine[name], others[name]) for name in others)


@pytest.mark.filterwarnings("ignore:overflow")
def test_captures_that_fail_cost_a_warning_each_and_not_the_run(run, tmp_path, monkeypatch, caplog):
    def capture(recipe, runner, parts, scores, whole):
        iteration = whole.plan.iteration
        if iteration == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if iteration == 1:
            scores = torch.full_like(scores, 1e308)  # which a weight of 10 takes to infinity
            recipe = recipe.model_copy(update={"reward": [recipe.reward[0].model_copy(update={"weight": 10.0})]})
        return capture_forest(recipe, runner, parts, scores, whole)

    def save(folder, forest):
        if forest.numbers.iteration == 2:
            raise PermissionError(13, "Permission denied")
        save_forest(folder, forest)

    monkeypatch.setattr("flowgrove.trainer.capture_forest", capture)
    monkeypatch.setattr("flowgrove.trainer.save_forest", save)
    succeed("train", run[0], "--out", tmp_path, "--set", "run.forest_every=1")
    assert names(tmp_path) == both(3)
    warned = [message for message in caplog.messages if "forest" in message]
    reasons = ("OutOfMemoryError: CUDA out of memory", "ValidationError: ", "PermissionError: ")
    for iteration, (message, reason) in enumerate(zip(warned, reasons, strict=True)):
        assert message.startswith(f"no forest of iteration {iteration} is kept, and the run goes on: {reason}")
        assert "\n" not in message
    assert_trained_as(tmp_path, run[1])


def test_a_capture_whose_decoding_runs_out_of_memory_leaves_the_runs_decoding_as_it_is(run, tmp_path, monkeypatch):
    decode, budgets, within = Policy.decode, [], []

    def capture(recipe, runner, *rest):
        monkeypatch.setattr(Policy, "decode", full_once)
        forest = capture_forest(recipe, runner, *rest)
        within.append(runner.budget.pixels)
        return forest

    def full_once(self, x, together):
        monkeypatch.setattr(Policy, "decode", seen_decode)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def seen_decode(self, x, together):
        budgets.append(together)
        return decode(self, x, together)

    monkeypatch.setattr(Policy, "decode", seen_decode)
    monkeypatch.setattr("flowgrove.trainer.capture_forest", capture)
    succeed("train", run[0], "--out", tmp_path)
    assert names(tmp_path) == both(0, 2, 3)
    whole = max(budgets)
    assert within == [whole * 32 * 32 // 2] * 3  # every one began with the run's own and halved it
    assert budgets.count(whole // 2) == 3
    assert set(budgets) == {whole, whole // 2}
    assert_trained_as(tmp_path, run[1])


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(3), Stopped(15)])
def test_what_ends_a_run_ends_it_in_a_capture_too(ending, run, tmp_path, monkeypatch):
    def capture(*_):
        raise ending

    monkeypatch.setattr("flowgrove.trainer.capture_forest", capture)
    assert flowgrove("train", run[0], "--out", tmp_path).exit_code != 0
    assert not (tmp_path / "metrics.jsonl").exists() or metrics_of(tmp_path) == []
