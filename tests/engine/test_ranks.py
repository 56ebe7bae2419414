"""What ranks tell each other, and that they train what one process would."""

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from engine_cases import checkpoints, metrics_of, refuse, succeed
from flowgrove.joining import agreed_name, joined
from flowgrove.pulse import ENDED, NOTES, Pulse, this_process
from flowgrove.ranks import Ranks
from flowgrove.recipe.schema import Engine
from flowgrove.run.summaries import update_summary
from flowgrove.update.updater import UpdateStats
from rank_cases import CASES, FP64, KL, LORA, MODES, UPDATE, assert_same, last, wait_for_lines, written
from torchrun import DEADLINE, process_of, started, torchrun, train

TELL = """
import time
import torch
from torch import nn
from flowgrove.errors import UserError
from flowgrove.joining import joined
from flowgrove.ranks import ElsewhereError
from flowgrove.recipe.schema import Engine

def fails(error):
    raise error

def ended(work):
    try:
        ranks.together(work)
    except (UserError, ElsewhereError, ValueError) as error:
        return type(error).__name__, str(error)

with joined(Engine(distributed="ddp"), torch.device("cpu")) as ranks:
    me = ranks.rank
    assert (ranks.size, ranks.first) == (3, me == 0)
    assert [part.tolist() for part in ranks.gather(torch.full((me, 2), me))] == [[], [[1, 1]], [[2, 2], [2, 2]]]
    counts = [2, 5]
    whole = [torch.arange(2 * count).double() for count in counts]
    share = ranks.shares(counts)
    mine = [part[2 * some.start : 2 * some.stop] for part, some in zip(whole, share)]
    assert all(torch.equal(a, b) for a, b in zip(ranks.gather_parts(mine, counts, 2), whole, strict=True))
    assert (ranks.most(me), ranks.total(me)) == (2, 3)
    mine = torch.full((2,), 1.0 + me)
    assert ranks.sum(mine).tolist() == [6.0, 6.0] and mine.tolist() == [1.0 + me] * 2
    assert ranks.chosen(f"rank {me} says ü") == "rank 0 says ü"
    assert ranks.chosen(None if me == 0 else "no") is None
    assert ranks.chosen("" if me == 0 else "no") == ""
    ranks.leave_note(f"from {me}", f"{me} and ü")
    until = time.monotonic() + 60  # nobody waits until a note has come to the store
    while any(ranks.note(f"from {rank}") is None for rank in range(3)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [ranks.note(f"from {rank}") for rank in range(4)] == ["0 and ü", "1 and ü", "2 and ü", None]
    assert ranks.together(lambda: me) == me
    assert ranks.by_first(lambda: f"rank {me}") == ("rank 0" if me == 0 else None)
    try:
        ranks.by_first(lambda: fails(UserError("the first one's")))
    except UserError as error:
        assert str(error) == "the first one's"
    else:
        raise AssertionError("an error of the first rank ends all")
    assert ended(lambda: me == 1 and fails(UserError("write this"))) == ("UserError", "write this")
    other = ended(lambda: me >= 1 and fails(ValueError("by mistake")))
    assert other == (("ValueError", "by mistake") if me == 1 else ("ElsewhereError", "rank 1: ValueError: by mistake"))
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
    weights[0].grad = torch.full((2,), 1.0 + me, dtype=torch.float64)
    if me == 2:
        weights[1].grad = torch.ones(2, dtype=torch.float64)
    ranks.sum_gradients(weights)
    assert weights[0].grad.tolist() == [6.0, 6.0] and weights[1].grad.tolist() == [1.0, 1.0]
    assert weights[2].grad is None
    if ranks.first:
        print("all is told")
"""

# what make test holds, beside runs of divided weights that go on in one process; the rest belongs to make test-long
SAMPLE = [(2, "ddp", "tree pruned by reward")]
ALL = [(ranks, mode, case) for ranks in (2, 3) for mode in MODES for case in CASES]


def test_shares_are_in_order_and_within_one_of_each_other():
    for size in range(1, 6):
        for count in range(12):
            shares = [Ranks(rank, size).share(count) for rank in range(size)]
            assert [number for share in shares for number in range(count)[share]] == list(range(count))
            lengths = [share.stop - share.start for share in shares]
            assert max(lengths) - min(lengths) <= 1


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    size=st.integers(1, 8),
)
def test_shares_of_several_sizes_are_within_one_of_each_other_alone_and_together(counts, size):
    shares = [Ranks(rank, size).shares(counts) for rank in range(size)]
    lengths = np.array([[part.stop - part.start for part in of_rank] for of_rank in shares])
    for part, count in enumerate(counts):
        assert [number for of_rank in shares for number in range(count)[of_rank[part]]] == list(range(count))
    for some in (*lengths.T, lengths.sum(1)):
        assert max(some) - min(some) <= 1


def test_as_many_sizes_as_prompts_leave_no_rank_idle():
    assert [Ranks(rank, 2).shares([1, 1, 1, 1]) for rank in range(2)] == [
        [slice(0, 0), slice(0, 1), slice(0, 0), slice(0, 1)],
        [slice(0, 1), slice(1, 1), slice(0, 1), slice(1, 1)],
    ]


def test_ranks_tell_each_other_values_errors_and_gradients(tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    assert "all is told" in torchrun(3, tmp_path / "tell.py", output=tmp_path / "log")


@pytest.mark.parametrize(
    ("ranks", "mode", "case"),
    [
        pytest.param(
            *each, id=f"{each[2]}, {each[0]} ranks, {each[1]}", marks=() if each in SAMPLE else pytest.mark.long
        )
        for each in ALL
    ],
)
def test_several_ranks_train_what_one_does(ranks, mode, case, tmp_path):
    recipe = written(tmp_path, **CASES[case])
    succeed("train", recipe, "--out", tmp_path / "one")
    train(ranks, recipe, "--out", tmp_path / "several", output=tmp_path / "log", **MODES[mode])
    assert_same(tmp_path / "several", tmp_path / "one")
    lines = [line["train_passes"] for line in metrics_of(tmp_path / "one")]
    assert [line["train_passes"] for line in metrics_of(tmp_path / "several")] == lines


@pytest.mark.long
def test_saved_and_resumed_twice_is_what_went_on_to_the_last_bit(tmp_path):
    """k + stop + k + stop + k equals 3k on the same ranks, metrics included."""
    recipe = written(tmp_path, iterations=3, run={"eval_every": 0}, **CASES["full fine-tuning, KL"])
    train(2, recipe, "--out", tmp_path / "whole", output=tmp_path / "log", **MODES["fsdp2"])
    text = recipe.read_text()
    for iterations in (1, 2, 3):
        recipe.write_text(text.replace("iterations: 3", f"iterations: {iterations}"))
        train(2, recipe, "--out", tmp_path / "parts", output=tmp_path / "log", **MODES["fsdp2"])
    for kind in ("weights", "optimizer", "ema"):
        left, right = last(tmp_path / "parts", kind), last(tmp_path / "whole", kind)
        assert list(left) == list(right)
        assert all(torch.equal(left[name], right[name]) for name in left)
    clocks = ("seconds", "samples_per_second", "peak_memory_bytes")
    for line, wanted in zip(metrics_of(tmp_path / "parts"), metrics_of(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in line.items() if k not in clocks} == {
            k: v for k, v in wanted.items() if k not in clocks
        }


@pytest.mark.long
def test_copies_of_a_division_train_what_one_process_does(tmp_path):
    """HSDP: two copies of weights that two ranks divide each."""
    recipe = written(tmp_path, **CASES["full fine-tuning, KL"])
    succeed("train", recipe, "--out", tmp_path / "one")
    out = tmp_path / "four"
    train(4, recipe, "--out", out, output=tmp_path / "log", distributed="fsdp2", shard_degree=2)
    assert_same(out, tmp_path / "one")
    (files,) = {len(list((out / "checkpoints").glob(f"*/{kind}/*"))) for kind in ("weights", "optimizer", "ema")}
    assert files == 2  # of one copy


@pytest.mark.long
def test_in_bf16_lora_layers_beside_divided_weights_train_as_beside_whole_ones(tmp_path):
    recipe = written(tmp_path, model={**LORA, "dtype": "bf16"}, update=KL)
    for mode in ("ddp", "fsdp2"):
        train(2, recipe, "--out", tmp_path / mode, output=tmp_path / "log", **MODES[mode])
    left, right = last(tmp_path / "ddp"), last(tmp_path / "fsdp2")
    assert all(torch.equal(left[name], right[name]) for name in left)


COUNTED = """
import collections, json, os, pathlib, sys
import torch.distributed as dist
from flowgrove.cli import app
from flowgrove.iteration import Stages
from flowgrove.trainer import Trainer
from flowgrove.update.updater import Updater

where, counts, depth = ["elsewhere"], collections.defaultdict(collections.Counter), [0]

def counted(name, kind):
    original = getattr(dist, name)
    def call(*args, **kwargs):
        if not depth[0] and (name != "all_reduce" or len(args) < 2):  # which weights have gradients is a word of ranks
            counts[where[-1]][kind] += 1
        depth[0] += 1
        try:
            return original(*args, **kwargs)
        finally:
            depth[0] -= 1
    setattr(dist, name, call)

def inside(kind, method, stage):
    original = getattr(kind, method)
    def call(*args, **kwargs):
        where.append(stage)
        try:
            return original(*args, **kwargs)
        finally:
            where.pop()
    setattr(kind, method, call)

names = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter", "all_reduce": "sum"}
names |= {"all_gather_single": "gather", "reduce_scatter_single": "scatter"}  # as newer versions have it
for name, kind in names.items():
    if hasattr(dist, name):
        counted(name, kind)
inside(Trainer, "iterate", "gathering")
inside(Stages, "_roll_out_and_score", "rollout")
inside(Updater, "run", "update")
inside(Updater, "_step", "step")
try:
    app(prog_name="flowgrove", standalone_mode=False)
finally:
    if os.environ["RANK"] == "0":
        pathlib.Path(sys.argv[0]).with_suffix(".json").write_text(json.dumps(counts))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "case"),
    [("ddp", "tree pruned by reward"), ("fsdp2", "full fine-tuning"), ("fsdp2, kept gathered", "full fine-tuning")],
)
def test_what_ranks_send_each_other_is_counted(mode, case, tmp_path):
    """Of one iteration with two updates of one pass each, of a transformer with U units that are gathered as one."""
    cases = {**CASES, "full fine-tuning": {"model": FP64, "update": UPDATE}}
    recipe = written(tmp_path, iterations=1, run={"eval_every": 0}, **cases[case])
    (tmp_path / "counted.py").write_text(COUNTED)
    sets = [word for key, value in MODES[mode].items() for word in ("--set", f"engine.{key}={str(value).lower()}")]
    sets += ["--set", "engine.token_budget=100000"]
    torchrun(2, tmp_path / "counted.py", "train", recipe, *sets, "--out", tmp_path / "run", output=tmp_path / "log")
    counts = json.loads((tmp_path / "counted.json").read_text())
    assert "rollout" not in counts  # no pass of it waits for another rank
    if mode == "ddp":
        assert counts == {"step": {"sum": 2}}
        return
    units = counts["gathering"]["gather"]
    assert units == 4  # three blocks and what is around them
    # norms and tables are added up beside; the norms of the parts, a number each, are not counted here
    assert counts["step"] == {"sum": 2}
    assert counts["update"]["scatter"] == 2 * units
    kept = mode == "fsdp2, kept gathered"
    # what the rollout has gathered serves the first update; else blocks come for the way there and the way back
    assert counts["update"]["gather"] == (units if kept else 2 * (2 * units - 1)), counts


DIGESTS = """
import hashlib
from flowgrove.cli import app
from flowgrove.trainer import Trainer

run = Trainer.run

def told(trainer, *rest):
    run(trainer, *rest)
    weights, pieces = trainer.policy.weights.trainable(), trainer.policy.weights.pieces
    parts = [(name, pieces[name].start if name in pieces else 0, p) for name, p in weights.items()]
    parts += [(name, start, trainer.updater.ema.average[name]) for name, start, _ in parts]
    digests = [hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for *_, p in parts]
    said = trainer.ranks.tell(
        " ".join(f"{name}:{start}:{digest}" for (name, start, _), digest in zip(parts, digests, strict=True))
    )
    words = [word.rsplit(":", 1) for text in said for word in text.split()]
    alike = {key: {digest for other, digest in words if other == key} for key, _ in words}
    assert all(len(digests) <= 2 for digests in alike.values())  # the weight's, its average's
    if trainer.ranks.first:
        print("parts", len(alike), "heard", len(words))

Trainer.run = told
app(prog_name="flowgrove")
"""


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "engine"), [(3, "ddp"), (3, "fsdp2"), (4, "fsdp2")])
def test_what_several_ranks_hold_of_the_same_rows_has_the_same_bits(ranks, engine, tmp_path):
    """Weights and averages that are whole on every rank, and with 4 ranks those of two copies of a division."""
    recipe = written(tmp_path, iterations=5, **CASES["full fine-tuning, pruned by reward"])
    (tmp_path / "digests.py").write_text(DIGESTS)
    sets = ["--set", f"engine.distributed={engine}", *(["--set", "engine.shard_degree=2"] if ranks == 4 else [])]
    text = torchrun(
        ranks, tmp_path / "digests.py", "train", recipe, *sets, "--out", tmp_path / "run", output=tmp_path / "log"
    )
    parts, heard = map(int, re.search(r"parts (\d+) heard (\d+)", text).groups())
    assert heard > parts > 0


FULL = """
import os, sys, torch
from flowgrove.cli import app
from flowgrove.models.policy import Policy

velocity = Policy.velocity

def full(self, x, *rest):
    if torch.is_grad_enabled() and len(x) > 8 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return velocity(self, x, *rest)

Policy.velocity = full
app(prog_name="flowgrove")
"""


@pytest.mark.long
def test_a_memory_that_is_full_in_a_meeting_ends_all_and_the_run_goes_on_with_smaller_passes(tmp_path):
    recipe = written(tmp_path, **CASES["full fine-tuning, KL"])
    (tmp_path / "full.py").write_text(FULL)
    out, log = tmp_path / "run", tmp_path / "log"
    sets = ("--set", "engine.distributed=fsdp2", "--set", "run.eval_every=0")
    begun = time.monotonic()
    text = torchrun(2, tmp_path / "full.py", "train", recipe, *sets, "--out", out, output=log, code=1)
    assert time.monotonic() - begun < 60  # of which all but ten seconds are two imports of torch
    why = "error: the GPU's memory is full on rank 1 in a training pass of up to 4096 tokens: the same command goes on"
    assert text.count("error: ") == text.count(why) == 1, text
    torchrun(2, tmp_path / "full.py", "train", recipe, *sets, "--out", out, output=log)
    assert len(metrics_of(out)) == 3


CAPTURE = """
import flowgrove.trainer
from flowgrove.cli import app

def full(*_):
    raise MemoryError("no room for pictures")

flowgrove.trainer.capture_forest = full
app(prog_name="flowgrove")
"""


@pytest.mark.long
def test_a_forest_that_cannot_be_drawn_ends_no_rank(tmp_path):
    recipe = written(tmp_path, **CASES["window, LoRA, KL"])
    succeed("train", recipe, "--out", tmp_path / "one")
    (tmp_path / "capture.py").write_text(CAPTURE)
    sets = ("--set", "engine.distributed=ddp")
    text = torchrun(
        2, tmp_path / "capture.py", "train", recipe, *sets, "--out", tmp_path / "two", output=tmp_path / "log"
    )
    assert text.count("the run goes on: MemoryError: no room for pictures") == 2, text  # of iterations 0 and 2
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
def test_a_signal_to_one_rank_ends_all_after_the_same_iteration_with_a_checkpoint(tmp_path):
    recipe = written(tmp_path, iterations=10_000, **CASES["window, LoRA, KL"])
    out = tmp_path / "run"
    options = ("--set", "engine.distributed=ddp", "--set", "run.eval_every=0", "--out", out)
    with started(2, "-m", "flowgrove", "train", recipe, *options, output=tmp_path / "log") as process:
        wait_for_lines(out, 2, process, tmp_path / "log")
        os.kill(process_of(1, process.pid), signal.SIGTERM)
        process.wait(DEADLINE)
    (saved,) = checkpoints(out)
    assert int(saved[5:]) == len(metrics_of(out))
    assert all(set(line["seconds"]) == {"plan", "rollout", "reward", "credit", "update"} for line in metrics_of(out))
    text = (tmp_path / "log").read_text()
    assert text.count("the same command goes on from it") == 1
    assert "exitcode  : 143" in text


@pytest.mark.long
def test_torchrun_starts_all_anew_when_one_is_killed_and_they_go_on(tmp_path):
    """Its store outlives them, and in it where those before could be reached."""
    recipe = written(tmp_path, iterations=12, **CASES["window, LoRA, KL"])
    text = recipe.read_text()
    assert "checkpoint_every: 0" in text
    recipe.write_text(text.replace("checkpoint_every: 0", "checkpoint_every: 1"))
    succeed("train", recipe, "--out", tmp_path / "one")
    out, options = tmp_path / "run", ("--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    train = ("-m", "flowgrove", "train", recipe, "--set", "engine.distributed=ddp", "--out", out)
    with started(2, *train, output=tmp_path / "log", options=(*options, "--max-restarts", "1")) as process:
        wait_for_lines(out, 3, process, tmp_path / "log")
        os.kill(process_of(1, process.pid), signal.SIGKILL)
        assert process.wait(DEADLINE) == 0, (tmp_path / "log").read_text()
    assert "another rank of this run has gone" in (tmp_path / "log").read_text()
    assert_same(out, tmp_path / "one")


@pytest.mark.long
def test_an_error_on_one_rank_is_told_once(tmp_path):
    (tmp_path / "picky.py").write_text(
        "import os\n\nif os.environ['RANK'] == '1':\n    raise ValueError('not these')\n\n"
        "def score(pictures, prompts):\n    return [0.0] * len(prompts)\n"
    )
    recipe = written(
        tmp_path, reward=[{"name": "python", "file": "picky.py", "function": "score"}], update=UPDATE, model=LORA
    )
    text = train(2, recipe, "--allow-python", "--out", tmp_path / "run", output=tmp_path / "log", code=1)
    assert text.count("error: ") == text.count("not these") == 1, text


def test_several_processes_of_a_run_for_one_are_refused(tmp_path, monkeypatch):
    recipe = written(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "write ddp" in refuse("train", recipe, "--out", tmp_path / "run")
    assert "runs in one process" in refuse("export", tmp_path, "--out", tmp_path / "export")
    assert not (tmp_path / "run").exists()


def test_ddp_without_torchrun_is_a_world_of_one(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined(Engine(distributed="ddp"), torch.device("cpu")) as ranks:
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)
        assert ranks.together(lambda: 3) == 3
        assert not dist.is_initialized()


def test_a_rank_that_no_longer_counts_is_named_and_one_that_is_slow_is_not(caplog):
    store = dist.HashStore()

    def pulse(rank):
        return Pulse(store, rank, 3, pytest.fail, beat=0.02, silence=0.3, farewell=0.1)

    with pulse(0), pulse(2):
        with pulse(1) as stopped:
            time.sleep(1.0)
            assert caplog.messages == []
            stopped._over.set()
            time.sleep(1.0)
            assert caplog.messages == ["rank 1 has given no sign of life for 0 s: has it been stopped?"]
            with pulse(1):
                time.sleep(0.5)
        time.sleep(0.6)  # its part is over
    assert caplog.messages[1:] == ["rank 1 counts again"]


def test_a_rank_that_does_not_end_with_the_others_is_ended():
    store, ended = dist.HashStore(), []
    with Pulse(store, 1, 2, ended.append, beat=0.02, farewell=0.3):
        time.sleep(0.2)
        dist.PrefixStore(NOTES, store).set(ENDED, "why ü")
        time.sleep(0.1)
        assert ended == []
        time.sleep(0.6)
        assert ended == ["why ü"]


@pytest.mark.parametrize("left", [True, False])
def test_a_rank_whose_process_has_gone_ends_the_run_unless_its_part_was_over(left):
    """Whoever waits for it on a GPU is told by nothing else."""
    store, ended = dist.HashStore(), []
    place = this_process().rpartition(" ")[0]
    assert place
    other = subprocess.Popen(["sleep", "60"])
    with Pulse(store, 0, 2, ended.append, beat=0.02, farewell=0.2):
        with Pulse(store, 1, 2, pytest.fail, beat=0.02, process=f"{place} {other.pid}") as second:
            time.sleep(0.3)
            if not left:
                second._over.set()
            assert ended == []
            if not left:
                other.kill()
                other.wait()
                time.sleep(0.5)
        other.kill()
        other.wait()
        time.sleep(0.5)
        assert len(ended) == (0 if left else 1)
    assert left or ended[0].startswith("grank 1 of this run has gone")


def test_all_ranks_agree_on_a_name_that_those_before_them_did_not_have():
    """In a store with all that those before have written, and whatever torchrun counts."""
    store, names = dist.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda rank: agreed_name(store, rank, 4), range(4), timeout=30))
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3
    assert agreed_name(store, 0, 1) not in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_world_of_one_on_nccl_trains_what_a_run_without_torchrun_does(mode, dtype, tmp_path):
    """With fsdp2 gradients are added up in another order, so that its rewards are those to the last bit at first."""
    model = {**(LORA if mode == "ddp" else FP64), "dtype": dtype}
    engine = {"device": "cuda", "reuse_rollout_graph": False, "token_budget": 16384}
    recipe = written(tmp_path, engine=engine, update=KL, model=model)
    succeed("train", recipe, "--out", tmp_path / "alone")
    train(1, recipe, "--out", tmp_path / "one", output=tmp_path / "log", **MODES[mode])
    lines, wanted = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "alone")
    assert len(lines) == len(wanted) == 3
    exact = 3 if mode == "ddp" else 1
    assert [line["reward"] for line in lines[:exact]] == [line["reward"] for line in wanted[:exact]]
    assert lines[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=0.05 if dtype == "bf16" else 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_what_several_ranks_left_on_their_gpus_is_one_line_of_numbers():
    """All of it is in host memory then, the gradient's norm too."""

    class Two(Ranks):
        def __init__(self):
            super().__init__(0, 2)

        def gather(self, mine):
            assert mine.device.type == "cpu"
            return [mine, mine]

    some = torch.tensor([1.0, 1.5], device="cuda")
    stats = UpdateStats([some], [some.to(torch.int8)], [some - 1], [some[0]], [some - 1], [some[1]], 3)
    found = update_summary(stats.gathered(Two()))
    assert (found["ratio_mean"], found["grad_norm"], found["loss"]) == (1.25, 1.5, 2.0)
