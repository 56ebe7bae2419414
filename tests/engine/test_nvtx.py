"""NVTX for real: a small tool that NVTX loads into a training run writes down what the run annotates."""

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine_cases import EVAL_PROMPTS, metrics_of, tiny_recipe
from flowgrove.models.loading import load_model
from flowgrove.recipe.loading import load_recipe
from flowgrove.setup import Setup
from flowgrove.spans import COLORS, DOMAIN, STAGE
from reward_cases import pixels_of, serving
from subprocesses import ROOT, python

SOURCE = ROOT / "tests" / "support" / "nvtx_recorder.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
STEPS, PROMPTS, LEAVES, UPDATES, SAMPLES, TOKENS = 4, 2, 4, 2, 4, 256


@dataclass
class Range:
    """A range as the tool saw it: `parents` are the messages of those that it lies in, on its thread."""

    message: str
    thread: int
    category: str
    color: int
    sizes: dict[str, int] | None
    parents: tuple[str, ...]
    ended: bool = False

    @property
    def name(self) -> str:
        return self.message.rpartition("/")[2]


@dataclass
class Recorded:
    """Everything that one process annotated, in the order in which ranges began."""

    domains: dict[str, str] = field(default_factory=dict)
    ranges: list[Range] = field(default_factory=list)

    def named(self, name: str, within: str = "") -> list[Range]:
        return [one for one in self.ranges if one.name == name and one.message.startswith(within)]


def read(path: Path) -> Recorded:
    """What the recorder's source says of its lines."""
    found, categories, schemas, open_ranges = Recorded(), {"0": ""}, {}, {}
    for line in path.read_text(encoding="utf-8").splitlines():
        what, handle, *rest = line.split("\t")
        if what == "domain":
            found.domains[handle] = rest[0]
        assert found.domains[handle] == DOMAIN, "nothing else is annotated"
        if what == "category":
            categories[rest[0]] = rest[1]
        elif what == "schema":
            schemas[rest[0]] = [(entry.split(":")[0], int(entry.split(":")[2])) for entry in rest[1].split()]
        elif what == "push":
            thread, category, color, schema, content, message = rest
            inside = open_ranges.setdefault(thread, [])
            raw = bytes.fromhex(content)
            sizes = {name: int.from_bytes(raw[at : at + 8], "little") for name, at in schemas.get(schema, ())} or None
            parents = tuple(one.message for one in inside)
            inside.append(Range(message, int(thread), categories[category], int(color, 16), sizes, parents))
            found.ranges.append(inside[-1])
        elif what == "pop":
            open_ranges[rest[0]].pop().ended = True
    return found


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """The environment that loads the tool into a process, but for NVTX_RECORD, the file that it writes."""
    if COMPILER is None:
        pytest.skip("no C compiler to build the NVTX tool with")
    library = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    return {"NVTX_INJECTION64_PATH": str(library), "NVTX_DISABLE": None}


def tokens_of_a_row(run):
    """Of the tiny model: a picture's, and those of the text, which it does not mask."""
    (adapter, _) = load_model(run.setup.recipe, torch.device("cpu"), torch.float32, None)
    return adapter.geometry.tokens


def brightness(handler, content, number):
    handler.reply({"scores": [pixels_of(png).float().mean().item() for png in content["images"]]})


@dataclass
class Run:
    recorded: Recorded
    lines: list[dict]
    setup: Setup


@pytest.fixture(scope="module")
def run(recorder, tmp_path_factory):
    """Two iterations, scored by a server and so beside the rollout, and an evaluation before, after and between."""
    folder = tmp_path_factory.mktemp("run")
    with serving(brightness) as server:
        recipe = tiny_recipe(
            folder,
            reward=[{"name": "http", "url": server.url}, {"name": "jpeg_size", "weight": 0.1}],
            engine={"device": "cpu", "token_budget": TOKENS},
            run={"iterations": 2, "checkpoint_every": 1, "eval_every": 1, "eval": {"samples": SAMPLES}},
        )
        env = {**recorder, "NVTX_RECORD": str(folder / "record"), "OMP_NUM_THREADS": "1", "http_proxy": None}
        python("-m", "flowgrove", "train", recipe, "--out", folder / "run", env=env)
    return Run(read(folder / "record"), metrics_of(folder / "run"), Setup(load_recipe(recipe)))


def test_every_range_ends_and_is_named_by_those_that_it_lies_in(run):
    """On the main thread from an iteration or an evaluation on; another thread's outermost range has its path."""
    assert set(run.recorded.domains.values()) == {DOMAIN}
    main = run.recorded.ranges[0].thread
    for one in run.recorded.ranges:
        assert one.ended, one
        for outer, inner in pairwise((*one.parents, one.message)):
            assert inner.rpartition("/")[0] == outer, one
        if not one.parents and one.thread == main:
            assert "/" not in one.message
    outermost = Counter(one.message for one in run.recorded.ranges if not one.parents and one.thread == main)
    assert outermost == {"iteration 0": 1, "iteration 1": 1, "evaluation": 3, "checkpoint": 2}


def test_categories_and_colours_tell_the_kinds_apart(run):
    kinds = {one.name: one.category for one in run.recorded.ranges}
    for name, kind in {
        "transformer": "transformer", "backward": "transformer", "flow_step": "ops", "grpo_loss": "ops",
        "decode": "decode", "http": "reward", "jpeg_size": "reward", "optimizer": "optimizer",
        "iteration 0": STAGE, "rollout": STAGE, "reward": STAGE, "step 0": STAGE, "update 1": STAGE, "pass 0": STAGE,
    }.items():  # fmt: skip
        assert kinds[name] == kind
    assert all(one.color == COLORS[one.category] for one in run.recorded.ranges)


def test_the_rollout_has_a_range_for_every_step_and_every_pass(run):
    """The rows of its transformer ranges are the forwards that the metrics count."""
    row = tokens_of_a_row(run)
    for number, line in enumerate(run.lines):
        within = f"iteration {number}/rollout/"
        assert [one.message for one in run.recorded.ranges if one.parents == (within[:-9], within[:-1])] == [
            f"{within}step {step}" for step in range(STEPS)
        ]
        for name in ("transformer", "flow_step"):
            passes = run.recorded.named(name, within)
            assert {one.message for one in passes} == {f"{within}step {step}/{name}" for step in range(STEPS)}
            assert sum(one.sizes["rows"] for one in passes) == line["rollout_forwards"]
        passes = run.recorded.named("transformer", within)
        assert len(passes) > STEPS, "the token budget divides levels"
        assert all(one.sizes["tokens"] == one.sizes["rows"] * row <= TOKENS for one in passes)


def test_every_training_pass_has_a_range_with_its_forward_loss_and_backward(run):
    for number, line in enumerate(run.lines):
        rows = 0
        for update in range(UPDATES):
            within = f"iteration {number}/update/update {update}"
            passes = [one for one in run.recorded.ranges if one.name.startswith("pass ") and within in one.parents]
            assert [one.message for one in passes] == [f"{within}/pass {turn}" for turn in range(len(passes))]
            rows += sum(one.sizes["rows"] for one in passes)
            for one in passes:
                inside = [other for other in run.recorded.ranges if other.parents[-1:] == (one.message,)]
                forward = ["transformer"] if update else []  # the first update has the rollout's own
                assert [other.name for other in inside] == [*forward, "grpo_loss", "backward"]
                sizes = {other.name: other.sizes for other in inside}
                assert sizes.pop("grpo_loss") == {"rows": one.sizes["rows"], "tokens": 0}
                assert all(found == one.sizes for found in sizes.values())
            assert len(run.recorded.named("optimizer", within)) == 1
        assert rows == line["train_passes"] > 0


def test_rewards_beside_the_rollout_nest_in_their_own_thread(run):
    main = run.recorded.ranges[0].thread
    for number in range(len(run.lines)):
        reward = f"iteration {number}/reward"
        beside = [one for one in run.recorded.ranges if one.thread != main and one.message.startswith(reward)]
        assert {one.message for one in beside} == {
            reward, f"{reward}/decode", f"{reward}/http", f"{reward}/jpeg_size"
        }  # fmt: skip
        assert {one.parents for one in beside} == {(), (reward,)}
        for name in ("reward", "decode", "http", "jpeg_size"):
            assert sum(one.sizes["rows"] for one in beside if one.name == name) == PROMPTS * LEAVES
        waits = [one for one in run.recorded.ranges if one.message == reward and one.thread == main]
        assert [one.sizes for one in waits] == [None], "the training waits for what is not scored yet"


def test_evaluations_and_checkpoints_have_ranges(run):
    assert len(run.recorded.named("evaluation")) == 3
    pictures = len(EVAL_PROMPTS) * SAMPLES
    passes = run.recorded.named("transformer", "evaluation/rollout/")
    assert sum(one.sizes["rows"] for one in passes) == 3 * pictures * len(run.setup.eval_plan.steps)
    for name in ("decode", "http", "jpeg_size"):
        of_it = [one for one in run.recorded.ranges if one.name == name and one.message.startswith("evaluation/")]
        assert sum(one.sizes["rows"] for one in of_it) == 3 * pictures
        assert {one.message for one in of_it} == {f"evaluation/{'' if name == 'decode' else 'reward/'}{name}"}
    written = run.recorded.named("write_checkpoint")
    assert len(written) == 2
    assert run.recorded.ranges[0].thread not in {one.thread for one in written}


def test_without_the_tool_nothing_is_annotated(recorder, tmp_path):
    """The recorder would write its file as soon as a domain is made."""
    code = "from flowgrove import spans\nwith spans.span('a'):\n    print(spans._domain())"
    assert python("-c", code, env={"NVTX_RECORD": str(tmp_path / "no"), "NVTX_INJECTION64_PATH": None}).stdout == (
        "None\n"
    )
    python("-c", code, env={**recorder, "NVTX_RECORD": str(tmp_path / "yes")})
    assert not (tmp_path / "no").exists()
    assert [one.message for one in read(tmp_path / "yes").ranges] == ["a"]
